"""A bundle says where its cells lie; test_windows.py has how its engine keeps to it."""

import json

import numpy as np
import pytest

from support.cells import NAMES, ROWS, bundle_at
from support.command_line import run
from support.errors import refused
from support.fakes import edit_manifest
from zsseg_rt import Bundle, BundleError
from zsseg_rt.export.dense_onnx import guess_align


@pytest.mark.parametrize(
    ("size_hw", "grid_hw", "align"),
    [
        ((513, 513), (33, 33), "corners"),
        ((17, 33), (5, 9), "corners"),
        ((448, 448), (28, 28), "half_pixel"),
        ((9, 9), (3, 3), "half_pixel"),  # both would do
        ((513, 512), (33, 32), "half_pixel"),
        ((1, 5), (1, 2), "half_pixel"),
    ],
)
def test_sizes_tell_where_cells_lie(size_hw, grid_hw, align):
    assert guess_align(size_hw, grid_hw) == align


def test_the_command_says_what_it_took_and_the_bundle_what_is_unusual(tmp_path, capsys):
    bundle_at(tmp_path, corners=True)
    names, rows, guessed, told = (tmp_path / name for name in ("n", "r.npy", "a.zsseg", "b.zsseg"))
    names.write_text("\n".join(NAMES))
    np.save(rows, ROWS)
    options = ("export", "dense", tmp_path / "encoder.onnx", "--size", 21, "--mean", "none")
    options += ("--bank", names, rows, "--out")
    assert run(*options, guessed) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "taken to lie by corners" in said
    assert "--align" in said
    assert json.loads((guessed / "bundle.json").read_text())["head"]["align"] == "corners"
    assert run(*options, told, "--align", "half_pixel") == 0
    assert "taken" not in capsys.readouterr().out
    assert "align" not in json.loads((told / "bundle.json").read_text())["head"]
    assert Bundle.load(told).head.align == "half_pixel"
    assert run(*options, tmp_path / "c.zsseg", "--align", "edges") == 1
    assert "--align: expected" in capsys.readouterr().err
    edit_manifest(guessed, ("family",), "segment_tokens")
    edit_manifest(guessed, ("segments",), {"num_segments": 2})
    with refused(BundleError, None, "head.align"):
        Bundle.load(guessed)
