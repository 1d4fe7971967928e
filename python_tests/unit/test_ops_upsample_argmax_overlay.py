"""Labels and their overlay in one pass: equal to one after the other, bit for bit."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference


def make(classes, out_hw, seed=0, colours=None):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(1, classes, 6, 5)).astype(np.float32)
    frame = rng.integers(0, 256, (*out_hw, 3), np.uint8)
    return logits, frame, rng.integers(0, 256, (colours or classes, 3), np.uint8)


def rules(classes):
    rng = np.random.default_rng(3)
    seen = rng.random(classes) < 0.5
    return [
        {},
        {"activation": "sigmoid", "unknown_below": 0.8},
        {"activation": "softmax", "unknown_below": 0.2, "with_scores": True},
        {"activation": "sigmoid", "seen": seen, "seen_bias": 0.2},
        {"activation": "softmax", "seen": seen, "seen_bias": 0.01},
        {"seen": seen, "seen_bias": 0.3, "label_table": (7 * np.arange(classes) % 11).astype("u1")},
    ]


def both(device, logits, frame, palette, alpha, rule):
    """In one pass, and one after the other."""
    placed = {k: device.place(v) if isinstance(v, np.ndarray) else v for k, v in rule.items()}
    given = [device.place(array) for array in (logits, frame, palette)]
    fused = ops.upsample_argmax_overlay(*given, alpha=alpha, stream=device.stream, **placed)
    labels, scores = ops.upsample_argmax(given[0], frame.shape[:2], stream=device.stream, **placed)
    label_hw = device.fetch(labels)[0]
    after = ops.overlay(
        given[1], device.place(label_hw), given[2], alpha=alpha, stream=device.stream
    )
    fetched = [None if array is None else device.fetch(array) for array in fused]
    return fetched, (label_hw[None], None if scores is None else device.fetch(scores), after)


@pytest.mark.parametrize("out_hw", [(1, 1), (13, 9), (37, 52), (64, 96), (33, 46)])
@pytest.mark.parametrize("index", range(6))
def test_it_equals_one_after_the_other(device, out_hw, index):
    logits, frame, palette = make(19, out_hw)
    fused, (labels, scores, after) = both(device, logits, frame, palette, 0.4, rules(19)[index])
    np.testing.assert_array_equal(fused[0], labels)
    np.testing.assert_array_equal(fused[2], device.fetch(after))
    if scores is not None:
        np.testing.assert_array_equal(fused[1], scores)
    drawn = reference.overlay(frame, labels[0], palette, alpha=0.4)
    np.testing.assert_array_equal(fused[2], drawn)


@pytest.mark.parametrize(("classes", "colours"), [(300, 300), (300, 40), (12, 5)])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.37])
def test_labels_without_a_colour_keep_the_frame(device, classes, colours, alpha):
    logits, frame, palette = make(classes, (41, 60), seed=1, colours=colours)
    rule = {"activation": "sigmoid", "unknown_below": 0.95}
    fused, (labels, _, after) = both(device, logits, frame, palette, alpha, rule)
    np.testing.assert_array_equal(fused[0], labels)
    np.testing.assert_array_equal(fused[2], device.fetch(after))
    bare = labels[0] >= colours
    assert bare.any()
    np.testing.assert_array_equal(fused[2][bare], frame[bare])


def test_the_picture_may_be_the_frame(device):
    logits, frame, palette = make(9, (40, 44), seed=2)
    expected = reference.upsample_argmax_overlay(logits, frame, palette)[2]
    given = device.place(frame.copy())
    picture = ops.upsample_argmax_overlay(
        device.place(logits), given, device.place(palette), picture=given, stream=device.stream
    )[2]
    assert picture is given
    np.testing.assert_array_equal(device.fetch(given), expected)


LOGITS, FRAME, PALETTE = make(4, (6, 8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frame": FRAME[..., 0].copy()}, ShapeError, "frame"),
        ({"frame": FRAME.astype("f4")}, DTypeError, "frame"),
        ({"logits": LOGITS.repeat(2, 0)}, ShapeError, "logits"),
        ({"palette": PALETTE[:, :2].copy()}, ShapeError, "palette"),
        ({"alpha": 1.5}, ArgumentError, "alpha"),
        ({"picture": np.zeros((6, 9, 3), np.uint8)}, ShapeError, "picture"),
    ],
)
def test_what_is_refused(change, error, message):
    arguments = {"logits": LOGITS, "frame": FRAME, "palette": PALETTE, **change}
    with refused(error, message):
        ops.upsample_argmax_overlay(**arguments)
