"""The study of long lists of names: that it runs, and that further names count as wrong."""

import json

import numpy as np

from tools.studies import long_lists
from zsseg_rt import Bundle, Engine, EngineConfig


def test_it_runs(tmp_path, capsys):
    arguments = ["--scenes", "1", "--seeds", "0", "--quick", "--json", str(tmp_path / "rows.json")]
    assert long_lists.main(arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["names"], row["candidates"]) for row in rows} == {
        (size, most) for size in (28, 60) for most in (None, 8, 16, 32)
    }
    by_key = {(row["names"], row["candidates"]): row["pAcc"] for row in rows}
    assert by_key[28, None] == by_key[28, 32]
    assert by_key[60, None] <= by_key[28, None]
    assert "| scenes | 60 | 16 |" in capsys.readouterr().out


def test_further_names_are_wrong_even_where_nothing_is_named():
    picture = np.zeros((64, 64, 3), np.uint8)
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu")) as engine:
        engine.set_classes(["red ball", "brick wall"])
        found = engine.segment(picture).labels
        truth = np.full(found.shape, 1, np.int64)
        figures = long_lists._figures(engine, 1, [(picture, truth)])
    assert figures["pAcc"] < 100 * np.mean(found != 1) + 1e-6
