"""Official checkpoints of CAT-Seg, without torch: whole, or as what training changed of CLIP.

Only q and v of both towers are tuned: 25.1 M of 154.3 M numbers differ from OpenAI's CLIP.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import CheckpointError
from zsseg_rt.networks.cat_seg import GROUP, NUM_LAYERS
from zsseg_rt.networks.layers import thirds
from zsseg_rt.torch_files.clip_arrays import ClipTensors, read_floats
from zsseg_rt.torch_files.shapes import IMAGE_TOWER, TEXT_TOWER, Array, Checked, under
from zsseg_rt.torch_files.weights import DIFFERS_FROM, read_notes

T = TypeVar("T")

CLIP_PREFIX = "sem_seg_head.predictor.clip_model."
_HEAD = "sem_seg_head.predictor.transformer."
_NAMES = {
    f"{CLIP_PREFIX}visual.": "image_encoder.",
    CLIP_PREFIX: "text_encoder.",
    _HEAD: "aggregator.",
}
_KEYS, _HASH = "equal_keys", "equal_sha256"  # in a difference's metadata, beside DIFFERS_FROM
_UNREAD = re.compile(r"text_encoder\.logit_scale|aggregator\..*\.attn_mask")


def _split(table: str) -> str:
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
_TABLE = (
    "upsample1.weight W U 2 2\nupsample1.bias U\nupsample2.weight W X 4 4\nupsample2.bias X\n"
    + under("aggregator.", _AGGREGATOR)
)


def read_cat_seg(path: Path, clip: Mapping[str, Array] | None = None) -> dict[str, Array]:
    """Read an official checkpoint, or a difference with :func:`official_arrays` of its CLIP."""
    notes = {} if clip is None else read_notes(path)
    own = read_floats(path, lambda _: True, part=DIFFERS_FROM in notes)
    if clip is None or DIFFERS_FROM not in notes:
        return own
    keys = notes.get(_KEYS, "").split()
    shared = {key: clip[key] for key in keys if key in clip}
    expected = notes.get(_HASH, "")
    if len(shared) < len(keys) or _sha256(shared) != expected:
        raise CheckpointError(
            f"clip: expected {notes[DIFFERS_FROM][:80]}, of which {path.name} lacks {len(keys)} "
            f"tensors with SHA-256 {expected[:12]}, got other weights. Pass that CLIP, as a file "
            "of any kind."
        )
    return shared | own


def check_cat_seg(tensors: Mapping[str, Array], name: str) -> tuple[dict[str, Array], int]:
    """The arrays that inference reads, under the names of our model, and the head's channels."""
    refuse_others(tensors, name)
    named = {k: v for k, v in own_names(tensors).items() if not _UNREAD.fullmatch(k)}
    table = _TABLE + under("image_encoder.", _split(IMAGE_TOWER))
    if any(key.startswith("text_encoder.") for key in named):
        table += under("text_encoder.", _split(TEXT_TOWER))
    file = Checked(tensors=named, where=name, what="cat_seg")
    sizes = file.check(table)
    file.check_square("image_encoder.positional_embedding", sizes["R"])
    if sizes["A"] % GROUP or sizes["B"] % GROUP:
        raise CheckpointError(
            f"{name}: expected decoders of multiples of {GROUP} channels, got {sizes['A']} and "
            f"{sizes['B']}. {file.remedy}"
        )
    return named, sizes["H"]


def own_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Official tensors under the names of our model."""
    named = {}
    for key, value in tensors.items():
        prefix = next((prefix for prefix in _NAMES if key.startswith(prefix)), "")
        named[_NAMES.get(prefix, "") + key.removeprefix(prefix)] = value
    return named


def refuse_others(tensors: Mapping[str, Any], name: str = "state_dict") -> None:
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
    patches = tensors.get(f"{CLIP_PREFIX}visual.conv1.weight")
    if patches is not None and patches.ndim == 4 and patches.shape[3] == 14:
        raise CheckpointError(
            f"{CLIP_PREFIX}visual.conv1.weight: expected CAT-Seg B, whose patches are 16 pixels "
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


# --- beside the CLIP that it was tuned from ---


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
    return {CLIP_PREFIX + key: value for key, value in named.items()}


def equal_keys(tensors: Mapping[str, Array], clip: Mapping[str, Array]) -> list[str]:
    """Keys of the float32 tensors that are CLIP's, bit for bit."""
    equal = [key for key in clip if key in tensors and _equal(tensors[key], clip[key])]
    if not equal:
        raise CheckpointError(
            "clip: expected the CLIP that the checkpoint was tuned from, with which it shares "
            "tensors, got one with which it shares none. Pass OpenAI's ViT-B/16."
        )
    return equal


def write_difference(
    path: Path, tensors: Mapping[str, Array], equal: Iterable[str], name: str
) -> None:
    """Write what differs from a CLIP, ``.safetensors``, with a hash of what does not."""
    from safetensors.numpy import save

    equal = sorted(equal)
    metadata = {
        DIFFERS_FROM: name,
        _KEYS: " ".join(equal),
        _HASH: _sha256({key: tensors[key] for key in equal}),
    }
    own = {key: np.asarray(tensors[key], order="C") for key in tensors.keys() - set(equal)}
    write_whole(path, save(own, metadata))


def _equal(one: Array, other: Array) -> bool:
    if one.dtype != np.float32 or other.dtype != np.float32 or one.shape != other.shape:
        return False
    return np.array_equal(one.view(np.int32), other.view(np.int32))


def _sha256(tensors: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = np.asarray(tensors[key], order="C")
        digest.update(f"{key} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).data)
    return digest.hexdigest()
