"""Official checkpoints of ZegCLIP, CLIP-RC, ZegFormer and CAT-Seg, without torch.

A system is a table of keys and shapes; see :mod:`zsseg_rt.torch_files.shapes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zsseg_rt.errors import CheckpointError
from zsseg_rt.networks.cat_seg import GROUP, NUM_LAYERS
from zsseg_rt.networks.layers import thirds
from zsseg_rt.networks.zegformer import CLIP, GROUPS
from zsseg_rt.torch_files.clip_arrays import ClipTensors, read_floats
from zsseg_rt.torch_files.shapes import IMAGE_TOWER, TEXT_TOWER, Array, Checked, some, under

T = TypeVar("T")

# --- ZegCLIP and CLIP-RC ---

IMAGE_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGE_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
"""Of red, green and blue in [0, 1], as both systems were trained."""

# What official checkpoints hold and inference never reads.
_UNREAD_BY_DESCRIPTORS = re.compile(
    r"decode_head\.(.*\.(self_attn|norm1)\..*|loss_decode\..*|recovery_decoder\..*)"
)
PROMPTS = """
deep_prompt_embeddings Y X W
prompt_embeddings 1 X W
prompt_proj. W W
prompt_norm. W
"""
CROSS_LAYERS = """
layers.#.multihead_attn.q. Q Q
layers.#.multihead_attn.k. Q K
layers.#.multihead_attn.v. Q K
layers.#.multihead_attn.proj. Q Q
layers.#.linear1. H Q
layers.#.linear2. Q H
layers.#.norm2. Q
layers.#.norm3. Q
"""
CELLS = "region_level_bridge C W\n"


def read_descriptor(
    path: Path, architecture: str
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Backbone, head and text tower of an official checkpoint of ``"zegclip"`` or ``"clip_rc"``."""
    tensors = read_floats(path, lambda key: not _UNREAD_BY_DESCRIPTORS.fullmatch(key))
    check_descriptor(tensors, architecture, path.name)
    visual, head, text = (
        {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        for part in ("backbone.", "decode_head.", "text_encoder.")
    )
    return visual, head, text


def check_descriptor(
    tensors: Mapping[str, Any], architecture: str, where: str = "state_dict"
) -> dict[str, int]:
    """Refuse other tensors than those of a system, of which what is never read may be there."""
    used = {key: v for key, v in tensors.items() if not _UNREAD_BY_DESCRIPTORS.fullmatch(key)}
    file = Checked(tensors=used, where=where, what=architecture)
    if not file.has("backbone.") or not file.has("decode_head."):
        raise CheckpointError(
            f"{where}: expected the keys of {architecture}, 'backbone.conv1.weight' and so on, got "
            f"{some(list(used))}. {file.remedy}"
        )
    cells = architecture == "clip_rc"
    if cells:
        decoder = "q_proj. Q 2D\nlateral_proj. Q 3D\n" + "".join(
            under(f"{stack}.", CROSS_LAYERS.replace("Q K", "Q Q").replace("H", letter))
            for stack, letter in (("decoder_q", "H"), ("decoder_v", "G"))
        )
    else:
        decoder = "q_proj. Q 2D\n"
        decoder += under("decoder_1.", CROSS_LAYERS.replace("Q K", "Q D"))
    table = under("backbone.", IMAGE_TOWER + PROMPTS + CELLS * cells)
    table += under("decode_head.", decoder)
    table += under("text_encoder.", TEXT_TOWER) * file.has("text_encoder.")
    sizes = file.check(table)
    file.check_square("backbone.positional_embedding", sizes["R"])
    if cells:
        file.check_square("backbone.region_level_bridge", sizes["C"], others=0)
    return sizes


# --- ZegFormer: its prompts, and its weights; training's files lack CLIP ---

SINGLE_TEMPLATE = ("A photo of a {} in the scene",)
"""Text branch of the VOC models, and of the R101 COCO-Stuff model in evaluation."""

SEGMENT_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    *SINGLE_TEMPLATE,
)
"""Text branch of the other models (official ``imagenet_select``)."""

REGION_TEMPLATES = (
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a cropped photo of a {}.",
    *(
        f"This is a {look}photo of a {size}{{}}"
        for look in ("", "masked ", "cropped ")
        for size in ("", "small ", "medium ", "large ")
    ),
    "A photo of a {} in the scene",
    "a bad photo of the {} in the scene",
    "a photo of the large {} in the scene",
    "a photo of the small {} in the scene",
    "a cropped photo of a {} in the scene",
    "a photo of a masked {} in the scene",
    *(
        f"{start} {look}{{}} in the scene"
        for look in ("", "masked ")
        for start in ("There is a", "There is the", "This is a", "This is the", "This is one")
    ),
)
"""CLIP branch of every model."""

# The loss's class weights fit the training vocabulary; the means are constants in this package.
_UNUSED_BY_ZEGFORMER = re.compile(r"criterion\..*|(clip_)?pixel_(mean|std)|.*\.num_batches_tracked")
_STAGES = {"res2": "A", "res3": "B", "res4": "E", "res5": "G"}  # widths of their bottlenecks
_LAYERS = """
layers.#.self_attn.in_proj_ 3N N
layers.#.self_attn.out_proj. N N
layers.#.multihead_attn.in_proj_ 3N N
layers.#.multihead_attn.out_proj. N N
layers.#.linear1. J N
layers.#.linear2. N J
layers.#.norm1. N
layers.#.norm2. N
layers.#.norm3. N
norm. N
"""


def read_zegformer(path: Path, clip: ClipTensors | None = None) -> dict[str, Array]:
    """Read an official checkpoint; ``clip`` replaces the checkpoint's own."""
    tensors = read_floats(path, lambda key: not _UNUSED_BY_ZEGFORMER.fullmatch(key))
    return check_zegformer(with_clip(tensors, clip), path.name)[0]


def with_clip(tensors: Mapping[str, Any], clip: ClipTensors | None) -> dict[str, Any]:
    """A checkpoint's tensors; those of CLIP are ``clip``'s if it is given."""
    if clip is None:
        return dict(tensors)
    rest = {key: value for key, value in tensors.items() if not key.startswith(CLIP)}
    return rest | {f"{CLIP}{key}": value for key, value in scaled_clip(clip).items()}


def scaled_clip(clip: ClipTensors) -> dict[str, Array]:
    """Both towers under OpenAI's names, with the scale that the official code uses."""
    return clip.named() | {"logit_scale": np.array(math.log(100.0), np.float32)}


def check_zegformer(
    tensors: Mapping[str, Any], where: str = "state_dict"
) -> tuple[dict[str, Any], dict[str, int]]:
    """The tensors that inference reads, and the sizes of their table."""
    used = {key: value for key, value in tensors.items() if not _UNUSED_BY_ZEGFORMER.fullmatch(key)}
    file = Checked(tensors=used, where=where, what="zegformer")
    has_clip = file.has(CLIP)
    sizes = file.check(_zegformer_table(file, has_clip=has_clip))
    if has_clip:
        file.check_square(f"{CLIP}visual.positional_embedding", sizes["R"])
    if sizes["C"] % GROUPS or sizes["N"] % 4:
        raise CheckpointError(
            f"{where}: expected decoders of multiples of {GROUPS} channels and queries of "
            f"multiples of 4, got {sizes['C']} and {sizes['N']}. {file.remedy}"
        )
    return used, sizes


def _zegformer_table(file: Checked, *, has_clip: bool) -> str:
    backbone, decoder = _normed("stem.conv1", "S", "3", 7), ""
    inputs = "S"
    for number, (stage, width) in enumerate(_STAGES.items(), 1):
        outputs = f"4{width}"
        for block, ins in (("0", inputs), ("#", outputs)):
            at = f"{stage}.{block}."
            backbone += _normed(f"{at}conv1", width, ins, 1)
            backbone += _normed(f"{at}conv2", width, width, 3)
            backbone += _normed(f"{at}conv3", outputs, width, 1)
        inner, outer, *_ = file.shape(f"backbone.{stage}.0.conv1.weight", 4)
        if number > 1 or outer != 4 * inner:  # the map's size or its channels change
            backbone += _normed(f"{stage}.0.shortcut", outputs, inputs, 1)
        last = stage == "res5"
        layers = [("layer", outputs if last else "C", 3), ("adapter", outputs, 1)]
        for name, ins, side in layers[: 1 if last else 2]:
            decoder += f"{name}_{number}.weight C {ins} {side} {side}\n{name}_{number}.norm. C\n"
        inputs = outputs
    depth = file.depth("sem_seg_head.predictor.mask_embed.layers.")
    predictor = f"""
query_embed.weight Z N
input_proj. N {inputs} 1 1
bg_feature 1 D
logit_scale 1
projection_layer. D N
mask_embed.layers.{depth - 1}. K N
mask_embed.layers.#. N N
{under("transformer.decoder.", _LAYERS)}"""
    table = under("backbone.", backbone)
    table += under("sem_seg_head.pixel_decoder.", f"mask_features. K C 3 3\n{decoder}")
    table += under("sem_seg_head.predictor.", predictor)
    if has_clip:
        table += under(CLIP, f"{under('visual.', IMAGE_TOWER)}{TEXT_TOWER}\nlogit_scale")
    return table


def _normed(name: str, outputs: str, inputs: str, side: int) -> str:
    """A convolution and its frozen batch norm."""
    parts = "".join(f"{name}.norm.running_{part} {outputs}\n" for part in ("mean", "var"))
    return f"{name}.weight {outputs} {inputs} {side} {side}\n{name}.norm. {outputs}\n{parts}"


# --- CAT-Seg: only q and v of both towers are tuned, the rest is CLIP's ---

_HEAD = "sem_seg_head.predictor.transformer."
_NAMES = {
    f"{CLIP}visual.": "image_encoder.",
    CLIP: "text_encoder.",
    _HEAD: "aggregator.",
}
_UNREAD = re.compile(rf"{re.escape(CLIP)}logit_scale|{re.escape(_HEAD)}.*\.attn_mask")


def split(table: str) -> str:
    """A tower's table with the attention weights of q, k and v apart."""
    return re.sub(
        r"^(.*attn\.)in_proj_ 3(\w) \w$",
        r"\1q_proj_weight \2 \2\n\1k_proj_weight \2 \2\n\1v_proj_weight \2 \2\n\1in_proj_bias 3\2",
        table,
        flags=re.MULTILINE,
    )


_WINDOWS = """
norm1. H
norm2. H
attn.q. H H+G
attn.k. H H+G
attn.v. H H
attn.proj. H H
mlp.fc1. 4H H
mlp.fc2. H 4H
"""
_CLASSES = """
attention.padding_tokens 1 1 H
attention.padding_guidance 1 1 Y
attention.attention.q. H H+Y
attention.attention.k. H H+Y
attention.attention.v. H H
attention.MLP.0. 4H H
attention.MLP.2. H 4H
attention.norm1. H
attention.norm2. H
swin_block.guidance_norm. G
"""
_UP = """
up.weight I O 2 2
up.bias O
conv.double_conv.0.weight N I 3 3
conv.double_conv.1. N
conv.double_conv.3.weight N N 3 3
conv.double_conv.4. N
"""
_LAYER = _CLASSES + under("swin_block.block_1.", _WINDOWS) + under("swin_block.block_2.", _WINDOWS)
_AGGREGATOR = (
    """
conv1. H 1 7 7
guidance_projection.0. G D 3 3
text_guidance_projection.0. Y D
head. 1 B 3 3
decoder_guidance_projection.0.0. J U 3 3
decoder_guidance_projection.1.0. K X 3 3
"""
    + "".join(under(f"layers.{number}.", _LAYER) for number in range(NUM_LAYERS))
    + under("decoder1.", _UP.replace("N", "A").replace("I", "H").replace("O", "Q"))
    + under("decoder2.", _UP.replace("N", "B").replace("I", "A").replace("O", "S"))
)
CAT_SEG = (
    "upsample1.weight W U 2 2\nupsample1.bias U\nupsample2.weight W X 4 4\nupsample2.bias X\n"
    + under(_HEAD, _AGGREGATOR)
)


def check_cat_seg(
    tensors: Mapping[str, Any], name: str = "state_dict"
) -> tuple[dict[str, Any], dict[str, int]]:
    """The tensors that inference reads, by our model's names, and the sizes of their table."""
    _refuse_others(tensors, name)
    used = {key: value for key, value in tensors.items() if not _UNREAD.fullmatch(key)}
    file = Checked(tensors=used, where=name, what="cat_seg")
    table = CAT_SEG + under(f"{CLIP}visual.", split(IMAGE_TOWER))
    if any(key.startswith(CLIP) and not key.startswith(f"{CLIP}visual.") for key in used):
        table += under(CLIP, split(TEXT_TOWER))  # if of it, all of it
    sizes = file.check(table)
    file.check_square(f"{CLIP}visual.positional_embedding", sizes["R"])
    if sizes["A"] % GROUP or sizes["B"] % GROUP:
        raise CheckpointError(
            f"{name}: expected decoders of multiples of {GROUP} channels, got {sizes['A']} and "
            f"{sizes['B']}. {file.remedy}"
        )
    named = {}
    for key, value in used.items():
        prefix = next((prefix for prefix in _NAMES if key.startswith(prefix)), "")
        named[_NAMES.get(prefix, "") + key.removeprefix(prefix)] = value
    return named, sizes


def _refuse_others(tensors: Mapping[str, Any], name: str) -> None:
    """Refuse the first generation, which had two backbones, and the large variant."""
    needed = ("upsample1.weight", f"{_HEAD}layers.0.attention.padding_tokens")
    earlier = any(key.startswith("backbone.") for key in tensors)
    if earlier or (
        any(key.startswith(_HEAD) for key in tensors) and any(key not in tensors for key in needed)
    ):
        raise CheckpointError(
            f"{name}: expected CAT-Seg as published with its paper in 2024, got an earlier "
            f"generation, without '{needed[0]}' or with a second backbone. Get the authors' newer "
            "weights (zsseg-rt fetch cat-seg-b16)."
        )
    patches = tensors.get(f"{CLIP}visual.conv1.weight")
    if patches is not None and patches.ndim == 4 and patches.shape[3] == 14:
        raise CheckpointError(
            f"{CLIP}visual.conv1.weight: expected CAT-Seg B, whose patches are 16 pixels "
            "wide, got 14, as in CAT-Seg L. Use the B weights."
        )


def check_masks(tensors: Mapping[str, Any], grid: int, window: int) -> None:
    """Stored masks follow from the windows; refuse those of others."""
    expected = ((grid // window) ** 2, window**2, window**2)
    for key, value in tensors.items():
        if key.endswith("attn_mask") and tuple(value.shape) != expected:
            raise CheckpointError(
                f"{key}: expected {list(expected)} for windows of {window} in a grid of {grid}, "
                f"got {list(value.shape)}. Pass the checkpoint's window and view."
            )


def split_weights(tower: Mapping[str, T]) -> dict[str, T]:
    """A tower's tensors with the attention weights of q, k and v apart."""
    split: dict[str, T] = {}
    for key, value in tower.items():
        if key.endswith("in_proj_weight"):
            stem = key.removesuffix("in_proj_weight")
            parts = zip("qkv", thirds(value), strict=True)
            split |= {f"{stem}{letter}_proj_weight": part for letter, part in parts}
        else:
            split[key] = value
    return split


def official_arrays(clip: ClipTensors) -> dict[str, Array]:
    """CLIP's arrays under the keys of CAT-Seg's checkpoints."""
    named = split_weights(clip.named())
    if clip.logit_scale is not None:
        named["logit_scale"] = np.array(clip.logit_scale, np.float32)
    return {CLIP + key: value for key, value in named.items()}


def equal_keys(tensors: Mapping[str, Array], clip: Mapping[str, Array]) -> list[str]:
    """Keys of the tensors that are CLIP's, bit for bit."""
    equal = [key for key in clip if key in tensors and _are_equal(tensors[key], clip[key])]
    if not equal:
        raise CheckpointError(
            "clip: expected the CLIP that the checkpoint was tuned from, with which it shares "
            "tensors, got one with which it shares none. Pass OpenAI's ViT-B/16."
        )
    return equal


def _are_equal(a: Array, b: Array) -> bool:
    is_alike = a.dtype == b.dtype and a.shape == b.shape
    return is_alike and np.array_equal(a.view(np.int32), b.view(np.int32))
