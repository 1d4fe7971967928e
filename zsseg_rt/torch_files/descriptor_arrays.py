"""Read official checkpoints of ZegCLIP and CLIP-RC without torch, or say why not."""

from __future__ import annotations

import re
from pathlib import Path

from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.clip_arrays import read_floats
from zsseg_rt.torch_files.shapes import IMAGE_TOWER, TEXT_TOWER, Array, Checked, some, under

IMAGE_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGE_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
"""Of red, green and blue in [0, 1], as both systems were trained."""

# What official checkpoints hold and inference never reads.
_UNREAD = re.compile(
    r"decode_head\.(.*\.(self_attn|norm1)\..*|loss_decode\..*|recovery_decoder\..*)"
)
_PARTS = ("backbone.", "decode_head.", "text_encoder.")
_PROMPTS = """
deep_prompt_embeddings Y X W
prompt_embeddings 1 X W
prompt_proj. W W
prompt_norm. W
"""
_LAYERS = """
layers.#.multihead_attn.q. Q Q
layers.#.multihead_attn.k. Q K
layers.#.multihead_attn.v. Q K
layers.#.multihead_attn.proj. Q Q
layers.#.linear1. H Q
layers.#.linear2. Q H
layers.#.norm2. Q
layers.#.norm3. Q
"""
_CELLS = "region_level_bridge C W\n"


def read_descriptor(
    path: Path, architecture: str
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Read an official checkpoint of ``"zegclip"`` or ``"clip_rc"``."""
    stored = read_floats(path, lambda key: not _UNREAD.fullmatch(key))
    tensors = {key: value for key, value in stored.items() if not _UNREAD.fullmatch(key)}
    visual, head, text = (
        {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        for part in _PARTS
    )
    file = Checked(tensors=tensors, where=path.name, what=architecture)
    if not visual or not head:
        raise CheckpointError(
            f"{path.name}: expected the keys of {architecture}, 'backbone.conv1.weight' and so "
            f"on, got {some(list(tensors))}. {file.remedy}"
        )
    cells = architecture == "clip_rc"
    if cells:
        decoder = "q_proj. Q 2D\nlateral_proj. Q 3D\n" + "".join(
            under(f"{stack}.", _LAYERS.replace("Q K", "Q Q").replace("H", letter))
            for stack, letter in (("decoder_q", "H"), ("decoder_v", "G"))
        )
    else:
        decoder = "q_proj. Q 2D\n"
        decoder += under("decoder_1.", _LAYERS.replace("Q K", "Q D"))
    table = under("backbone.", IMAGE_TOWER + _PROMPTS + _CELLS * cells)
    table += under("decode_head.", decoder) + under("text_encoder.", TEXT_TOWER) * bool(text)
    sizes = file.check(table)
    file.check_square("backbone.positional_embedding", sizes["R"])
    if cells:
        file.check_square("backbone.region_level_bridge", sizes["C"], others=0)
    return visual, head, text
