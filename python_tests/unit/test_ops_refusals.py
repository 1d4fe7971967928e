"""Refusals of every operation; the error names the argument."""

import numpy as np
import pytest

from support.bfloat16 import Bfloat16Array
from support.errors import refused
from support.operations import SOUND, as_type, f4, read_only, u1
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError

NAN, INF = float("nan"), float("inf")


NV12 = {"frame": (u1(4, 6), u1(2, 3, 2))}
# By operation: what is changed of a sound call, and the error; it names the first argument changed,
# or the one that is given.
REFUSED = {
    "preprocess": [
        ({"frame": [[0]]}, DTypeError), ({"frame": as_type(float, 4, 5, 3)}, DTypeError),
        ({"frame": u1(4, 5)}, ShapeError), ({"frame": u1(4, 5, 4)}, ShapeError),
        ({"frame": u1(0, 5, 3)}, ShapeError), ({"frame": u1(4, 6, 3)[:, ::2]}, ShapeError),
        ({"size_hw": (0, 3)}, ShapeError), ({"size_hw": (2, -1)}, ShapeError),
        ({"size_hw": (2, 40_000)}, ShapeError), ({"std": (1, 0, 1)}, ArgumentError),
        ({"std": (1, 1)}, ArgumentError), ({"mean": (0, NAN, 0)}, ArgumentError),
        ({"channel_order": "rbg"}, ArgumentError), ({"align": "centres"}, ArgumentError),
        ({"out": f4(3, 2, 2)}, ShapeError), ({"out": as_type(float, 3, 2, 3)}, DTypeError),
        ({"origin": (4, 0), "whole_hw": (4, 4)}, ArgumentError),
        ({"whole_hw": (4, 40_000)}, ShapeError),
        ({"frame": (u1(4, 6),)}, ArgumentError),
        ({"frame": (u1(4, 6), [1])}, DTypeError, "frame[1]"),
        ({"frame": (as_type("u2", 4, 6), u1(2, 3, 2))}, DTypeError, "frame[0]"),
        ({"frame": (u1(4, 6), as_type("u2", 2, 3, 2))}, DTypeError, "frame[1]"),
        ({"frame": (u1(6), u1(2, 3, 2))}, ShapeError, "frame[0]"),
        ({"frame": (u1(4, 6), u1(4, 6))}, ShapeError, "frame[1]"),
        ({"frame": (u1(3, 6), u1(2, 3, 2))}, ShapeError, "frame[0]"),
        ({"frame": (u1(0, 6), u1(2, 3, 2))}, ShapeError),
        ({"channel_order": "bgr", **NV12}, ArgumentError),
        ({"colour_matrix": "bt2020", **NV12}, ArgumentError),
        ({"out": as_type("f2", 3, 2, 2), **NV12}, ShapeError),
    ],
    "relationship_descriptor": [
        ({"cls_embed": f4(1, 3)}, ShapeError), ({"text_embeds": f4(4)}, ShapeError),
        ({"weight": f4(5, 4)}, ShapeError), ({"weight": f4(8, 5).T}, ShapeError),
        ({"bias": f4(4)}, ShapeError), ({"bias": as_type(float, 5)}, DTypeError),
        ({"text_queries": f4(3, 4)}, ShapeError), ({"out": f4(3, 5)}, ShapeError),
        ({"cls_embed": f4(1, 4), "text_embeds": as_type("f2", 3, 4), "weight": as_type("f2", 5, 8)},
         DTypeError),
        ({"weight": f4(5, 8), "cls_embed": as_type("f2", 1, 4), "text_embeds": as_type("f2", 3, 4)},
         DTypeError),
    ],
    "relationship_descriptor_text": [
        ({"weight": f4(5, 4)}, ShapeError), ({"bias": f4(4)}, ShapeError),
        ({"out": f4(5, 3)}, ShapeError),
    ],
    "patch_text_similarity": [
        ({"patch_embeds": f4(3, 4)}, ShapeError), ({"text_embeds": f4(5, 3)}, ShapeError),
        ({"text_embeds": f4(3, 5, 4)}, ShapeError),
        ({"text_embeds": as_type(float, 5, 4)}, DTypeError),
        ({"text_embeds": Bfloat16Array(as_type("u2", 5, 4)),
          "patch_embeds": as_type("f2", 2, 3, 4)}, DTypeError),
        ({"logit_scale": INF}, ArgumentError), ({"finite": u1(2)}, ShapeError),
        ({"finite": as_type(bool, 1)}, DTypeError), ({"out": as_type("f2", 2, 5, 3)}, DTypeError),
    ],
    "upsample_argmax": [
        ({"logits": as_type(float, 1, 4, 3, 3)}, DTypeError), ({"logits": f4(4, 3, 3)}, ShapeError),
        ({"logits": f4(1, 0, 3, 3)}, ShapeError), ({"logits": f4(1, 4, 0, 3)}, ShapeError),
        ({"logits": f4(1, 4, 3, 6)[..., ::2]}, ShapeError), ({"logits": [1.0]}, DTypeError),
        ({"out_hw": (0, 6)}, ShapeError), ({"out_hw": (6, 32768)}, ShapeError),
        ({"activation": "relu"}, ArgumentError), ({"align": "corner"}, ArgumentError),
        ({"seen": as_type(bool, 5)}, ShapeError), ({"seen": u1(4)}, DTypeError),
        ({"seen_bias": INF}, ArgumentError), ({"unknown_below": NAN}, ArgumentError),
        ({"out": as_type("u2", 1, 6, 6)}, DTypeError, "labels"),
        ({"out": u1(1, 6, 5)}, ShapeError, "labels"), ({"out": (None, f4(1, 6, 6))}, ArgumentError),
        ({"out": (None, None, None)}, ArgumentError), ({"label_table": [1, 2, 3, 4]}, DTypeError),
        ({"label_table": as_type("i4", 4)}, DTypeError), ({"label_table": u1(2, 2)}, ShapeError),
        ({"label_table": u1(3)}, ShapeError), ({"num_classes": 4}, DTypeError),
        ({"num_classes": np.array([4])}, DTypeError),
        ({"num_classes": as_type("i4", 2)}, ShapeError),
        ({"num_classes": np.array([5], "i4")}, ArgumentError),
        ({"num_classes": np.array([-1], "i4")}, ArgumentError),
        ({"label_table": u1(4), "out": as_type("u2", 1, 6, 6)}, DTypeError, "labels"),
    ],
    "upsample_argmax_overlay": [
        ({"frame": u1(6, 8)}, ShapeError), ({"frame": f4(6, 8, 3)}, DTypeError),
        ({"logits": f4(2, 4, 6, 5)}, ShapeError), ({"palette": u1(4, 2)}, ShapeError),
        ({"alpha": 1.5}, ArgumentError), ({"picture": u1(6, 9, 3)}, ShapeError),
    ],
    "overlay": [
        ({"frame": u1(5, 3)}, ShapeError), ({"labels": u1(3, 5)}, ShapeError),
        ({"labels": as_type(int, 4, 5)}, DTypeError), ({"palette": u1(3, 2)}, ShapeError),
        ({"alpha": 1.5}, ArgumentError), ({"alpha": NAN}, ArgumentError),
        ({"out": u1(5, 4, 3)}, ShapeError), ({"channel_order": "gbr"}, ArgumentError),
        ({"colour_matrix": "bt2020"}, ArgumentError), (NV12, ShapeError, "labels"),
        ({"frame": (u1(4, 6), u1(4, 5))}, ShapeError, "frame[1]"),
        ({"frame": (u1(4, 5), u1(4, 5, 3))}, ShapeError, "frame[0]"),
    ],
    "ink": [
        ({"picture": u1(31, 67, 2)}, ShapeError), ({"picture": u1(0, 67, 3)}, ShapeError),
        ({"picture": u1(31, 67, 3)[:, ::2]}, ShapeError),
        ({"picture": read_only(u1(31, 67, 3))}, ShapeError), ({"weights": u1(11, 23)}, ShapeError),
        ({"weights": f4(2, 11, 23)}, DTypeError), ({"colours": [(1, 2, 3)]}, ArgumentError),
        ({"colours": []}, ArgumentError), ({"colours": [(1, 2, 3)] * 5}, ArgumentError),
        ({"colours": [(0, 0, 256), (0, 0, 0)]}, DTypeError, "ink"),
        ({"place": (0.5, 0)}, DTypeError, "ink"),
    ],
    "all_finite": [
        ({"values": as_type(float, 3)}, DTypeError), ({"values": f4(4, 4).T[::2]}, ShapeError),
        ({"out": u1(2)}, ShapeError), ({"out": as_type(bool, 1)}, DTypeError),
    ],
    "count_labels": [
        ({"labels": as_type(int, 3)}, DTypeError), ({"labels": u1(4, 4)[:, ::2]}, ShapeError),
        ({"num_classes": -1}, ArgumentError), ({"num_classes": 65535}, ArgumentError),
        ({"out": as_type("i8", 3)}, ShapeError), ({"out": as_type("i4", 4)}, DTypeError),
    ],
    "merge_windows": [
        ({"logits": as_type("f2", 2, 3, 2, 2)}, DTypeError), ({"logits": f4(3, 2, 2)}, ShapeError),
        ({"shares": f4(8)}, ShapeError), ({"shares": f4(0, 4)}, ShapeError),
        ({"places": [(0, 0)]}, ArgumentError), ({"places": [(0, 0), (-1, 2)]}, ArgumentError),
        ({"places": [(0, 0)] * 17}, ArgumentError), ({"add": True}, ArgumentError, "out"),
        ({"out": f4(1, 3, 2, 3)}, ShapeError),
    ],
    "warp_blend": [
        ({"logits": f4(3, 4, 5)}, ShapeError), ({"logits": as_type("f2", 1, 3, 4, 5)}, DTypeError),
        ({"logits": f4(1, 0, 4, 5)}, ShapeError), ({"logits": f4(1, 3, 0, 5)}, ShapeError),
        ({"past": f4(1, 2, 4, 5)}, ShapeError), ({"past": as_type(float, 1, 3, 4, 5)}, DTypeError),
        ({"flow": f4(1, 4, 5)}, ShapeError), ({"flow": as_type("i4", 1, 4, 5, 2)}, DTypeError),
        ({"past_weight": f4(1, 4, 5, 2)}, ShapeError),
        ({"past_weight": as_type(bool, 1, 4, 5)}, DTypeError),
        ({"out": f4(1, 3, 5, 4)}, ShapeError),
        ({"logits": Bfloat16Array(as_type("u2", 1, 3, 4, 5))}, DTypeError),
    ],
    "mask_boxes": [
        ({"canvas_hw": (5000, 8)}, ShapeError), ({"out": as_type("i4", 3, 4)}, ShapeError),
    ],
    "crop_regions": [
        ({"image": f4(2, 16, 20)}, ShapeError), ({"image": as_type(float, 3, 16, 20)}, DTypeError),
        ({"image": f4(3, 1, 5000)}, ShapeError), ({"mask_logits": f4(4, 5)}, ShapeError),
        ({"mask_logits": f4(3, 0, 5)}, ShapeError),
        ({"regions": np.array([0, 3], "i4")}, ArgumentError),
        ({"regions": np.array([-1, 0], "i4")}, ArgumentError),
        ({"regions": as_type("i4", 65)}, ShapeError), ({"regions": as_type("i8", 2)}, DTypeError),
        ({"boxes": as_type("i4", 2, 6)}, ShapeError), ({"boxes": as_type("i4", 2, 5)}, ShapeError),
        ({"boxes": as_type("i4", 3, 5)}, ArgumentError),
        ({"boxes": np.array([[0, 0, 21, 16]] * 2, "i4")}, ArgumentError),
        ({"boxes": np.array([[4, 0, 4, 16]] * 2, "i4")}, ArgumentError),
        ({"side": 0}, ArgumentError), ({"style": "box"}, ArgumentError),
        ({"scale": (1, 1)}, ArgumentError), ({"offset": (0, INF, 0)}, ArgumentError),
        ({"out": f4(2, 3, 8, 9)}, ShapeError),
    ],
    "label_regions": [
        ({"mask_logits": as_type("f2", 3, 4, 5)}, DTypeError),
        ({"class_scores": f4(4, 2)}, ShapeError), ({"class_scores": f4(0, 3)}, ShapeError),
        ({"class_scores": f4(2, 257), "mask_logits": f4(257, 2, 2)}, ShapeError),
        ({"bias": f4(3)}, ShapeError), ({"canvas_hw": (0, 8)}, ShapeError),
        ({"out_hw": (5, 40_000)}, ShapeError), ({"unknown_below": NAN}, ArgumentError),
        ({"out": (u1(5, 5), f4(5, 5))}, ArgumentError), ({"out": (None, f4(5, 5))}, ArgumentError),
    ],
}  # fmt: skip
ROWS = [(name, *row) for name, rows in REFUSED.items() for row in rows]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{'-'.join(row[1])}")
def test_bad_arguments_are_refused(row):
    name, change, error, *argument = row
    getattr(ops, name)(**SOUND[name])
    with refused(error, argument[0] if argument else next(iter(change))):
        getattr(ops, name)(**{**SOUND[name], **change})


def test_every_operation_refuses_something():
    from support.operation_cases import MAKERS

    assert set(REFUSED) == set(SOUND) == set(MAKERS)
