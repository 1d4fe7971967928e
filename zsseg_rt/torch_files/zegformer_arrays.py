"""Official checkpoints of ZegFormer, and its prompts; training's files lack CLIP.

Source:
    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022, and its configurations.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from zsseg_rt.errors import CheckpointError
from zsseg_rt.networks.zegformer import CLIP, GROUPS
from zsseg_rt.torch_files.clip_arrays import ClipTensors, read_floats
from zsseg_rt.torch_files.shapes import IMAGE_TOWER, TEXT_TOWER, Array, Checked, under

# --- the prompts that the two branches embed class names in ---

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

# --- weights ---

# The loss's class weights fit the training vocabulary; the means are constants in this package.
UNUSED_KEYS = (
    r"criterion\..*",
    r"(clip_)?pixel_(mean|std)",
    r".*\.num_batches_tracked",
)
_UNUSED = re.compile("|".join(UNUSED_KEYS))
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
    tensors = read_floats(path, lambda key: not _UNUSED.fullmatch(key))
    tensors = {key: value for key, value in tensors.items() if not _UNUSED.fullmatch(key)}
    if clip is not None:
        towers = clip.named() | {"logit_scale": np.array(math.log(100.0), np.float32)}
        tensors = {key: value for key, value in tensors.items() if not key.startswith(CLIP)}
        tensors |= {f"{CLIP}{key}": value for key, value in towers.items()}
    file = Checked(tensors=tensors, where=path.name, what="zegformer")
    has_clip = any(key.startswith(CLIP) for key in tensors)
    sizes = file.check(_table(file, has_clip=has_clip))
    if has_clip:
        file.check_square(f"{CLIP}visual.positional_embedding", sizes["R"])
    if sizes["C"] % GROUPS or sizes["N"] % 4:
        raise CheckpointError(
            f"{path.name}: expected decoders of multiples of {GROUPS} channels and queries of "
            f"multiples of 4, got {sizes['C']} and {sizes['N']}. {file.remedy}"
        )
    return tensors


def _table(file: Checked, *, has_clip: bool) -> str:
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
