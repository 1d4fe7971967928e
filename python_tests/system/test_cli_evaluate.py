"""``zsseg-rt evaluate`` as people type it: table, JSON, picture, comparison, errors."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from support.colour_words import COLOUR_WORDS
from zsseg_rt import cli

NAMES = ("red", "green", "blue, navy")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def flags(tmp_path):
    """A folder of pictures and masks: stripes of one colour each, blue being unseen."""
    root = tmp_path / "flags"
    colours = np.array([COLOUR_WORDS[name.split(",")[0]] for name in NAMES], np.uint8)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("red\ngreen\nblue, navy [unseen]\n")
    for index in range(4):
        order = np.roll(np.arange(3), index).astype(np.uint8)
        labels = order.repeat(20)[None].repeat(30, axis=0)
        cv2.imwrite(str(root / "images" / f"{index}.png"), colours[labels][:, :, ::-1])
        labels[0] = 255
        cv2.imwrite(str(root / "masks" / f"{index}.png"), labels)
    return root


def run(*arguments):
    return cli.main(["evaluate", *(str(argument) for argument in arguments)])


def evaluate(bundle, flags, *arguments):
    return run(bundle, "--dataset", "folder", "--root", flags, "--split", "all",
               "--rename", "navy=blue", *arguments)  # fmt: skip


def test_table_json_and_confusion(colour_bundle, flags, tmp_path, capsys):
    report, matrix = tmp_path / "report.json", tmp_path / "confusion.csv"
    assert evaluate(colour_bundle, flags, "--json", report, "--confusion", matrix) == 0
    printed = capsys.readouterr().out
    for text in ("red", "unseen", "mIoU(S)", "hIoU", "4 of 4 images of flags/all"):
        assert text in printed
    written = json.loads(report.read_text())
    assert written["metrics_percent"]["pAcc"] > 95
    assert [row["seen"] for row in written["classes"]] == [True, True, False]
    assert [row["asked_as"] for row in written["classes"]] == ["red", "green", "blue"]
    assert sum(map(sum, written["confusion"])) == 4 * 29 * 60
    with matrix.open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert [rows[0][0], rows[0][-1]] == ["true class", "(unknown)"]
    assert [[*map(int, row[1:])] for row in rows[1:]] == written["confusion"]


def test_other_names_change_the_question_not_the_classes(colour_bundle, flags, tmp_path):
    report, names = tmp_path / "report.json", tmp_path / "names.txt"
    names.write_text("red\ngreen, orange\nblue\n")
    arguments = ["--dataset", "folder", "--root", flags, "--split", "all", "--json", report]
    assert run(colour_bundle, *arguments, "--classes", f"@{names}", "--rename", "red=blue",
               "--rename", "blue=red") == 0  # fmt: skip
    written = json.loads(report.read_text())
    assert [row["asked_as"] for row in written["classes"]] == ["blue", "green, orange", "red"]
    assert written["classes"][0]["iou_percent"] == 0.0
    assert written["classes"][1]["iou_percent"] > 90


def test_against_itself_nothing_differs(colour_bundle, flags, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert evaluate(colour_bundle, flags, "--against", colour_bundle, "--json", report,
                    "--limit", 2, "--precision", "float32") == 0  # fmt: skip
    assert "equal labels: 100.000%" in capsys.readouterr().out
    written = json.loads(report.read_text())
    assert written["agreement"] == 1.0
    assert set(written["differences_points"].values()) == {0.0}
    assert written["first"]["pictures"] == written["second"]["pictures"] == 2


def test_unseen_and_options_reach_the_data_set(colour_bundle, flags, tmp_path):
    report = tmp_path / "report.json"
    assert evaluate(colour_bundle, flags, "--unseen", "red,navy", "--json", report) == 0
    rows = json.loads(report.read_text())["classes"]
    assert [row["seen"] for row in rows] == [False, True, False]
    shifted = "zero_is_unlabelled=true"  # then the last class is in no mask
    assert evaluate(colour_bundle, flags, "--option", shifted, "--json", report) == 0
    assert json.loads(report.read_text())["classes"][2]["true_pixels"] == 0
    assert evaluate(colour_bundle, flags, "--option", "speed=1") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--protocol", "crop"], 2, "--protocol: expected one of whole, slide"),
        (["--protocol", "slide"], 1, "protocol: expected 'whole' for a bundle"),
        (["--classes", "red,blue"], 2, "--classes: expected 3 names"),
        (["--rename", "red"], 2, "--rename: expected 'OLD=NEW', got 'red'"),
        (["--rename", "pink=red"], 1, "expected old names from red, green, blue"),
        (["--option", "x"], 2, "--option: expected NAME=VALUE, got 'x'"),
        (["--limit", "0"], 2, "limit"),
        (["--split", "val"], 1, "split: expected 'all'"),
        (["--dataset", "nonsense"], 1, "camvid"),
    ],
)
def test_errors_say_what_to_do(colour_bundle, flags, capsys, arguments, code, message):
    assert evaluate(colour_bundle, flags, *arguments) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--confusion"])
def test_a_place_for_results_is_needed_first(colour_bundle, flags, tmp_path, capsys, option):
    assert evaluate(colour_bundle, flags, option, tmp_path / "nowhere" / "file") == 2
    out, err = capsys.readouterr()
    assert "expected a folder that can be written to" in err
    assert "mIoU" not in out  # nothing was evaluated in vain


def test_a_package_for_reading_data_is_named(colour_bundle, flags, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert evaluate(colour_bundle, flags) == 4
    assert "PIL: expected to be installed to read masks" in capsys.readouterr().err


def test_bundles_are_evaluated_without_torch(colour_bundle, flags):
    code = f"""
import sys
for name in ("torch", "torchvision", "onnx", "open_clip", "accelerate"):
    sys.modules[name] = None
from zsseg_rt import cli
sys.exit(cli.main(["evaluate", {str(colour_bundle)!r}, "--dataset", "folder", "--split", "all",
                   "--root", {str(flags)!r}, "--rename", "navy=blue"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pAcc 9" in done.stdout or "pAcc 100" in done.stdout


PROPOSALS = Path(__file__).parents[1] / "bundles" / "v1" / "proposals.zsseg"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((PROPOSALS, "--min-region-score", 2), (), "--min-region-score: expected"),
        ((PROPOSALS,), (PROPOSALS, "--against-min-region-score", 3), "got 3"),
        ((PROPOSALS,), ("colours", "--against-min-region-score", 0.1), "has no such setting"),
        ((PROPOSALS, "--min-region-score", 0.5), (PROPOSALS,), None),
    ],
)
def test_regions_to_skip(colour_bundle, flags, capsys, first, second, message):
    names = ("--classes", "name 0,name 1,name 2", "--device", "cpu")
    other = [colour_bundle if part == "colours" else part for part in second]
    against = ("--against", *other) if second else ()
    code = run(*first, *against, "--dataset", "folder", "--root", flags, "--split", "all", *names)
    assert code == (0 if message is None else 1 if "has no" in message else 2)
    assert message is None or message in capsys.readouterr().err
