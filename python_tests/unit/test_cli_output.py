"""How much commands print and in what form, and errors that name options."""

import csv
import io
import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest

from support.command_line import run
from zsseg_rt.bundles.pretrained import find_bundle
from zsseg_rt.cli.output import LinesAboveStatus, say
from zsseg_rt.common.schema import json_text, printable
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.results.visualize import read_label_png


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("spelt", ["--quiet", "-q"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_quiet_prints_nothing_wherever_it_stands(place, spelt, tmp_path, capfd):
    words = ["segment", "--demo", "scenes", "-o", str(tmp_path)]
    words.insert(place, spelt)
    assert run(*words) == 0
    assert capfd.readouterr() == ("", "")
    assert len(list(tmp_path.glob("*.mask.png"))) == len(demo_photos("scenes"))
    assert run("segment", "--demo", "scenes", "-o", tmp_path) == 0  # and lasts for one call
    assert "playroom.png" in capfd.readouterr().out


def test_quiet_still_tells_errors(tmp_path, capfd):
    assert run("segment", tmp_path / "gone.png", "--demo", "scenes", "-q") == 1
    assert run("segment", "--demo", "scenes", "--", "-q") == 1  # a photo of this name
    assert run("-q", "segment", tmp_path / "gone.png", "--demo", "scenes") == 1
    assert "gone.png" in capfd.readouterr().err


def test_verbose_after_the_command(tmp_path, capfd):
    assert run("segment", "--demo", "scenes", "-o", tmp_path, "-v") == 0
    assert "image_encoder: openvino on cpu" in capfd.readouterr().err


def test_format_json_is_a_line_per_photo(tmp_path, capfd):
    gone = tmp_path / "broken.png"
    gone.write_bytes(b"none")
    call = (
        "segment",
        *demo_photos("scenes"),
        gone,
        "--demo",
        "scenes",
        "--classes",
        "ball,wall",
        "-o",
        tmp_path,
    )
    assert run(*call, "--format", "json") == 1
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [bool(line["error"]) for line in lines] == [False] * len(demo_photos("scenes")) + [True]
    assert lines[0]["photo"] == demo_photos("scenes")[0]
    assert {entry["name"] for entry in lines[0]["classes"]} <= {"ball", "wall"}
    assert "background (added" in err


def test_format_csv_is_a_row_per_class(tmp_path, capfd):
    call = ("segment", "--demo", "scenes", "--format", "csv", "-o", tmp_path)
    assert run(*call) == 0
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert list(rows[0]) == ["photo", "class", "share", "pixels", "mask", "error"]
    for photo in demo_photos("scenes"):
        shares = [float(row["share"]) for row in rows if row["photo"] == photo]
        assert sum(shares) == pytest.approx(1.0, abs=1e-4)


def test_formats_of_other_programs_are_written_beside_the_images(tmp_path, capfd):
    photo = demo_photos("scenes")[0]
    stem = Path(photo).stem
    call = (
        "segment",
        photo,
        "--demo",
        "scenes",
        "--class",
        "ball",
        "--class",
        "wall",
        "-o",
        tmp_path,
    )
    assert run(*call, "--format", "geojson") == 0
    assert f"{stem}.geojson" in capfd.readouterr().out
    again = tmp_path / f"{stem}.geojson"
    first = again.read_bytes()
    again.unlink()
    assert run(*call, "--format", "geojson", "--resume") == 0  # of the label image
    assert again.read_bytes() == first
    features = json.loads(first)["features"]
    assert {one["properties"]["name"] for one in features} <= {"ball", "wall"}
    assert run(*call, "--format", "labelme") == 0
    shapes = json.loads((tmp_path / f"{stem}.json").read_text())
    assert (tmp_path / shapes["imagePath"]).samefile(photo)
    assert run(*call, "--format", "coco") == 0
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert [one["name"] for one in coco["categories"]] == ["ball", "wall"]
    labels = read_label_png(tmp_path / f"{stem}.mask.png")
    for annotation in coco["annotations"]:
        assert annotation["area"] == (labels + 1 == annotation["category_id"]).sum()


def test_the_bundle_that_ships_has_a_name(tmp_path, capfd):
    for name, bundle in {
        "demo": "photos",
        "demo-photos": "photos",
        "demo-scenes": "scenes",
    }.items():
        assert find_bundle(name) == demo_bundle(bundle)
        assert run("info", name) == 0
    call = ("segment", demo_photos()[0], "--bundle", "demo", "-o", tmp_path, "--format", "png")
    assert run(*call, "--classes", "") == 2
    assert run(*call, "--classes", demo_classes()[0], "--precision", "fp32") == 0


@pytest.mark.parametrize(
    ("options", "begin"),
    [
        (["--classes", "zebra"], "--classes: expected words"),
        (["--classes", "ball,ball"], "--classes: expected every name once"),
        (["--template", "none"], "--template"),
        (["--format", "xml"], "--format: expected one of table, json, csv, png, coco"),
        (["--classes", ""], "name at least one class"),
        (["--min-region-score", "0.5"], "--min-region-score: expected"),
    ],
)
def test_errors_name_options(options, begin, tmp_path, capsys):
    assert run("segment", "--demo", "scenes", "-o", tmp_path, *options) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"zsseg-rt: {begin}")
    assert error.count("\n") == 1


def test_completion_can_be_installed(capsys):
    assert run("--help") == 0
    assert "--install-completion" in capsys.readouterr().out.replace("\n", "")


def test_a_log_line_on_a_terminal_stands_above_the_status(monkeypatch):
    terminal, other = io.StringIO(), io.StringIO()
    for stream in (terminal, other):
        monkeypatch.setattr(stream, "isatty", lambda stream=stream: stream is terminal)
    record = logging.LogRecord("zsseg_rt", logging.WARNING, "", 0, "gone", None, None)
    drawing = io.StringIO()  # what rich puts in the place of standard error while it draws
    monkeypatch.setattr(sys, "stderr", drawing)
    for stream in (terminal, other):
        LinesAboveStatus(stream).emit(record)
    assert (drawing.getvalue(), terminal.getvalue(), other.getvalue()) == ("gone\n", "", "gone\n")


ODD = [
    "\x1b[2J\r\n",
    "a\u2028b\u2029",
    "\u202e\u2066",
    "\x7f\x85\x9b",
    "\udce9",
    "\U000e0001",
    "\ufeff",
]
PLAIN = [
    "caf\u00e9",
    "\u0645\u06cc\u200c\u062e",
    "\U0001f468\u200d\U0001f466",
    "9\u202fAM",
    "\u30b0\u3000a",
]


@pytest.mark.parametrize("text", ODD + PLAIN)
def test_names_stay_on_their_line_and_json_means_what_it_meant(text):
    shown, document = printable(text), json_text({text: [text]}, indent=1)
    assert json.loads(document) == {text: [text]}
    assert (shown == text) == (text in PLAIN)
    for told in (shown, *document.split("\n")):
        assert told.splitlines() == [told]
        assert not {"Cc", "Zl", "Zp", "Cs"} & {unicodedata.category(c) for c in told}
        assert not set("\u202e\u2066\ufeff") & set(told)


def test_tables_and_lines_of_the_log_escape_alike(capsys, monkeypatch):
    from rich.table import Table

    table = Table("name", box=None)
    table.add_row("a\x1b[31m\n\u202eb")
    say(table)
    say("a\x1b[31m\n\u202eb")
    record = logging.LogRecord("x", 30, "", 0, "%s", ("a\x1b[31m\n\u202eb",), None)
    assert LinesAboveStatus(sys.stderr).format(record) == r"a\x1b[31m\n\u202eb"
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed == ["name", *[r"a\x1b[31m\n\u202eb"] * 2]
