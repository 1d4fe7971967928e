"""Runs on the synthetic world that take seconds: a tiny CLIP file, data and a loop of two steps."""

import tiny
from safetensors.torch import save_file

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77)
TABLES = {
    "data": {
        "name": "scenes",
        "options": {"size": 64, "length": 8},
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


def save_clip(path):
    """Write a tiny CLIP with the standard vocabulary; its activation is quick_gelu."""
    save_file({k: v.contiguous() for k, v in tiny.clip_state_dict(SIZES).items()}, path)
    return path
