"""A sound call of every operation."""

import numpy as np

from zsseg_rt import ops


def f4(*shape):
    return np.zeros(shape, np.float32)


def u1(*shape):
    return np.zeros(shape, np.uint8)


def as_type(dtype, *shape):
    return np.zeros(shape, dtype)


def read_only(array):
    array.flags.writeable = False
    return array


UNIT = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
BOXES = np.array([[0, 0, 20, 16], [1, 2, 3, 4]], np.int32)
SOUND = {
    "preprocess": {"frame": u1(4, 5, 3), "size_hw": (2, 3), **UNIT},
    "relationship_descriptor": {
        "cls_embed": f4(1, 4), "text_embeds": f4(3, 4), "weight": f4(5, 8), "bias": f4(5),
        "text_queries": f4(3, 5),
    },
    "relationship_descriptor_text": {
        "text_embeds": f4(3, 4), "weight": f4(5, 8), "bias": f4(5),
    },
    "patch_text_similarity": {"patch_embeds": f4(2, 3, 4), "text_embeds": f4(5, 4)},
    "upsample_argmax": {
        "logits": f4(1, 4, 3, 3), "out_hw": (6, 6), "seen": as_type(bool, 4),
    },
    "upsample_argmax_overlay": {
        "logits": f4(1, 4, 6, 5), "frame": u1(6, 8, 3), "palette": u1(4, 3),
        "seen": as_type(bool, 4), "label_table": as_type("u2", 4), "picture": u1(6, 8, 3),
    },
    "overlay": {"frame": u1(4, 5, 3), "labels": as_type("u2", 4, 5), "palette": u1(3, 3)},
    "ink": {
        "picture": u1(31, 67, 3), "weights": u1(2, 11, 23), "place": (0, 0),
        "colours": [(1, 2, 3)] * 2,
    },
    "all_finite": {"values": f4(3)},
    "count_labels": {"labels": as_type("u2", 4, 5), "num_classes": 3},
    "merge_windows": {"logits": f4(2, 3, 2, 2), "shares": f4(2, 4), "places": [(0, 0), (0, 2)]},
    "warp_blend": {
        "logits": f4(1, 3, 4, 5), "past": f4(1, 3, 4, 5), "flow": f4(1, 4, 5, 2),
        "past_weight": f4(1, 4, 5),
    },
    "mask_boxes": {"mask_logits": f4(3, 4, 5), "canvas_hw": (8, 8)},
    "crop_regions": {
        "image": f4(3, 16, 20), "mask_logits": f4(3, 4, 5), "regions": np.array([0, 2], np.int32),
        "boxes": BOXES, "side": 8,
    },
    "label_regions": {
        "mask_logits": f4(3, 4, 5), "class_scores": f4(4, 3), "canvas_hw": (8, 8), "out_hw": (5, 5),
        "bias": f4(4),
    },
}  # fmt: skip
PAIRED = ("upsample_argmax", "upsample_argmax_overlay", "label_regions")


def arrays_and_settings(name):
    """A sound call's arrays, with what it writes, and its settings."""
    call = SOUND[name]
    arrays = {key: value for key, value in call.items() if isinstance(value, np.ndarray)}
    settings = {key: value for key, value in call.items() if key not in arrays}
    if name not in (*PAIRED, "ink"):
        arrays["out"] = np.zeros_like(getattr(ops, name)(**call))
    return arrays, settings


OPERATIONS = {name: arrays_and_settings(name) for name in SOUND}
