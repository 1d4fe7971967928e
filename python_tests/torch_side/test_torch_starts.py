"""Patterns before the first block, and around parts of rows: what matches, and what must stay."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from support.patterns import FLOAT, HALF, check, node, weights

ROWS, WIDTH, BEFORE, BEHIND = 6, 8, 1, 2
IMAGE = {"x": (FLOAT, [2, 3, 9, 12])}
PATCHES = {"y": (FLOAT, [2, ROWS, WIDTH])}


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_of_patches_is_a_product(tmp_path, bias):
    """The ninth row of pixels belongs to no patch."""
    held = {"w": weights(WIDTH, 3, 4, 4), "b": weights(WIDTH), "shape": np.array([2, WIDTH, ROWS])}
    nodes = [
        node("Conv", "x w b" if bias else "x w", "maps", strides=[4, 4]),
        node("Reshape", "maps shape", "columns"),
        node("Transpose", "columns", "y", perm=[0, 2, 1]),
    ]
    counts, left = check(tmp_path, nodes, IMAGE, PATCHES, held)
    assert counts["patch_product"] == 1
    assert left == ["Patches", "Linear" if bias else "MatMul"]


@pytest.mark.parametrize(
    "settings",
    [
        {"strides": [2, 2], "kernel_shape": [4, 4]},
        {"strides": [4, 4], "pads": [0, 1, 0, 1]},
        {"strides": [4, 4], "group": 3},
    ],
    ids=str,
)
def test_other_convolutions_are_left(tmp_path, settings):
    channels = 3 // settings.get("group", 1)
    held = {"w": weights(9, channels, 4, 4), "shape": np.array([2, 9, -1])}
    nodes = [
        node("Conv", "x w", "maps", **settings),
        node("Reshape", "maps shape", "columns"),
        node("Transpose", "columns", "y", perm=[0, 2, 1]),
    ]
    rows = 15 if settings["strides"] == [2, 2] else ROWS
    counts, left = check(tmp_path, nodes, IMAGE, {"y": (FLOAT, [2, rows, 9])}, held)
    assert counts["patch_product"] == 0
    assert left[0] == "Conv"


def start(norm_first, around="cls patches"):
    """As CLIP's tower begins; with rows behind as CLIP-RC's, without the first norm as MAE's."""
    yield node("Add", "x positions", "placed")
    if norm_first:
        yield node("LayerNormalization", "placed scale shift", "patches", epsilon=1e-4)
    else:
        yield node("Identity", "placed", "patches")
    yield node("Concat", around, "some", axis=1)
    yield node("Concat", "some cells", "tokens", axis=1)
    yield node("LayerNormalization", "tokens scale_2", "y")
    yield node("Mul", "tokens scale_2", "z")


START = {
    "positions": weights(ROWS, WIDTH),
    "cls": weights(1, BEFORE, WIDTH),
    "cells": weights(1, BEHIND, WIDTH),
    **{name: weights(WIDTH) for name in ("scale", "shift", "scale_2")},
}
X = {"x": (FLOAT, [1, ROWS, WIDTH])}
TOKENS = [1, BEFORE + ROWS + BEHIND, WIDTH]
BOTH = {"y": (FLOAT, TOKENS), "z": (FLOAT, TOKENS)}


@pytest.mark.parametrize("norm_first", [True, False])
def test_rows_before_the_first_block_are_one_launch(tmp_path, norm_first):
    nodes = [made for made in start(norm_first) if made.op_type != "Identity"]
    if not norm_first:
        nodes[0] = node("Add", "positions x", "patches")
    counts, left = check(tmp_path, nodes, X, BOTH, START, tolerance=2e-5)
    assert counts["fused_start"] == 1
    assert left == ["StartRows", "Mul"]


def test_constant_rows_in_half_precision_are_normalised_as_others(tmp_path):
    held = {name: value.astype(np.float16) for name, value in START.items()}
    inputs = {"x": (HALF, X["x"][1])}
    outputs = dict.fromkeys(BOTH, (HALF, TOKENS))
    counts, _ = check(tmp_path, [*start(True)], inputs, outputs, held, tolerance=1e-2)
    assert counts["fused_start"] == 1


@pytest.mark.parametrize("why", ["tokens are a result", "rows are no constant", "rows are read"])
def test_other_starts_are_left(tmp_path, why):
    nodes, inputs, outputs = [*start(True)], X, BOTH
    if why == "tokens are a result":
        outputs = BOTH | {"tokens": (FLOAT, TOKENS)}
    elif why == "rows are no constant":
        nodes, inputs = [*start(True, "more patches")], X | {"more": (FLOAT, [1, BEFORE, WIDTH])}
    else:
        outputs = BOTH | {"patches": (FLOAT, [1, ROWS, WIDTH])}
    counts, _ = check(tmp_path, nodes, inputs, outputs, START, tolerance=2e-5)
    assert counts["fused_start"] == 0


@pytest.mark.parametrize(("end", "matches"), [(-2, True), (2, False)])
def test_norms_of_all_but_the_last_rows_are_one_with_the_sum(tmp_path, end, matches):
    nodes = [
        node("Add", "x more", "sum"),
        node("Slice", "sum zero end one one", "leading"),
        node("LayerNormalization", "leading scale shift", "y"),
        node("Mul", "sum scale", "z"),
    ]
    held = START | {"zero": np.array([0]), "one": np.array([1]), "end": np.array([end])}
    inputs, rows = X | {"more": X["x"]}, end % ROWS
    outputs = {"y": (FLOAT, [1, rows, WIDTH]), "z": (FLOAT, X["x"][1])}
    counts, left = check(tmp_path, nodes, inputs, outputs, held, tolerance=2e-5)
    assert counts["fused_add_norm"] == matches
    assert left[:2] == (["AddNorm", "Slice"] if matches else ["Add", "Slice"])


def test_what_is_rounded_in_parts_is_rounded_at_once(tmp_path):
    nodes = [
        node("Mul", "x scale", "wide"),
        node("Slice", "wide zero one one one", "first"),
        node("Cast", "first", "y", to=HALF),
        node("ReduceMean", "wide one", "mean", keepdims=1),
        node("Cast", "mean", "z", to=HALF),
    ]
    held = START | {"zero": np.array([0]), "one": np.array([1])}
    outputs = dict.fromkeys("yz", (HALF, [1, 1, WIDTH]))
    counts, left = check(tmp_path, nodes, X, outputs, held, tolerance=2e-3)
    assert counts["hoisted_casts"] == 1
    assert left == ["Mul", "Cast", "Slice", "ReduceMean"]
    nodes[2] = node("Identity", "first", "y")
    outputs["y"] = (FLOAT, [1, 1, WIDTH])
    counts, _ = check(tmp_path, nodes, X, outputs, held, tolerance=2e-3)
    assert counts["hoisted_casts"] == 0
