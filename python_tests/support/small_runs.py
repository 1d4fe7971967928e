"""Runs on the synthetic world that take seconds: a tiny CLIP file, data and a loop of two steps."""

import atexit
import shutil
import tempfile

from safetensors.torch import save_file

from support import tiny
from tools.scenes import write_folder
from zsseg_rt.training.config import TrainConfig

SCENES = write_folder(
    tempfile.mkdtemp(prefix="scenes-"), {"train": 8, "val": 8, "train_seen": 8}, size=64
)
"""A folder data set of the synthetic world."""
atexit.register(shutil.rmtree, SCENES, ignore_errors=True)

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77)
TABLES = {
    "data": {
        "name": "folder",
        "root": str(SCENES),
        "augmentation": {"kind": "center_crop", "crop_hw": [64, 64], "short_edge": 64},
    },
    "loop": {
        "iterations": 2,
        "batch_size": 2,
        "checkpoint_interval": 2,
        "num_workers": 0,
        "num_pictures": 0,
        "device": "cpu",
    },
}
"""Of a configuration; without a model."""
STUDENT = {"width": 32}
STUDENT |= dict.fromkeys(("num_heads", "decoder_heads", "head_heads"), 2)
STUDENT |= {"num_layers": 1, "decoder_layers": 1, "decoder_width": 16}
STUDENT |= {"grid_side": 4, "group_tokens": [4, 2]}
"""A small ZeroSeg."""


def save_clip(path):
    """Write a tiny CLIP with the standard vocabulary; its activation is quick_gelu."""
    save_file({k: v.contiguous() for k, v in tiny.clip_state_dict(SIZES).items()}, path)
    return path


def settings(root, clip_file="none.safetensors", **tables):
    """Of a run on a folder; ``tables`` add to them."""
    options = {"pretrained": str(clip_file), "activation": "quick_gelu", "image_size": 64}
    plain = {
        "data": {"name": "folder", "root": str(root)},
        "model": {"options": options | {"num_prompts": 2}},
        "loop": {"iterations": 60, "batch_size": 1, "num_workers": 0, "device": "cpu"},
        "evaluation": {"split": "val"},
        "output": {"folder": str(root.parent / "run")},
    }
    for table, fields in tables.items():
        plain.setdefault(table, {}).update(fields)
    return TrainConfig.from_dict(plain)
