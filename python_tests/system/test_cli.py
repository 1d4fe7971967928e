"""The command line as people type it: outputs, exit codes, errors, settings, interruptions."""

import csv
import io
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import unicodedata
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import typer

import zsseg_rt
from support.colour_words import COLOUR_WORDS, write_flags
from support.command_line import ctrl_c_once, python, run
from zsseg_rt import Engine, cli
from zsseg_rt.bundles.pretrained import find_bundle
from zsseg_rt.cli.options import flat_names, read_classes
from zsseg_rt.cli.output import LinesAboveStatus, say
from zsseg_rt.cli.stream import Notifier
from zsseg_rt.common.extras import import_opencv
from zsseg_rt.common.schema import json_text, printable
from zsseg_rt.config import EngineConfig
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.evaluation.datasets.published import class_table
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.results.visualize import palette, read_label_png
from zsseg_rt.server.settings import ServerSettings

SCENES = demo_photos("scenes")


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path_factory.getbasetemp() / "cli-home"))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def photo(tmp_path):
    return write_photo(tmp_path / "in" / "flag.png", "red", "white", "blue")


def write_photo(path, *names):
    path.parent.mkdir(exist_ok=True)
    columns = [np.full((30, 20, 3), COLOUR_WORDS[name][::-1], np.uint8) for name in names]
    cv2.imwrite(str(path), np.concatenate(columns, axis=1))
    return path


def test_segment_writes_pictures_table_and_json(photo, colour_bundle, tmp_path, capsys):
    out, report, names = (tmp_path / name for name in ("out", "report.json", "names.txt"))
    names.write_text("# colours\nblue, dark blue\n\nred\n")
    code = run("segment", photo, "--bundle", colour_bundle, "--classes", f"@{names}",
               "--background", "white", "--out", out, "--json", report)  # fmt: skip
    assert code == 0
    assert "red" in capsys.readouterr().out
    assert cv2.imread(str(out / "flag.overlay.png")).shape == (30, 60, 3)
    written = json.loads(report.read_text())
    (entry,) = written["photos"]
    assert entry["size_hw"] == [30, 60]
    assert {c["name"] for c in entry["classes"]} == {"red", "blue"}
    assert entry["unknown_share"] == pytest.approx(1 / 3, abs=0.05)
    assert written["engine"]["names"] == ["blue", "red"]
    mask = cv2.imread(str(out / "flag.mask.png"), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(mask[15, [10, 50]], palette(["red", "blue"]))


def test_folder_glob_and_broken_photo(photo, colour_bundle, tmp_path, capsys):
    write_photo(photo.parent / "other.png", "green")
    (photo.parent / "broken.jpg").write_bytes(b"\xff\xd8\xff garbage")
    out = tmp_path / "out"
    code = run("segment", photo.parent, "-b", colour_bundle, "--classes", "red,green", "-o", out)
    assert code == 1
    captured = capsys.readouterr()
    assert "broken.jpg: expected an image file" in captured.out.replace("\n", "")
    assert captured.err.strip() == "zsseg-rt: 1 of 3 photos failed; see above"
    assert (out / "flag.mask.png").is_file()
    assert (out / "other.mask.png").is_file()
    assert not (out / "broken.mask.png").exists()
    pattern = photo.parent / "*.png"
    second = write_photo(tmp_path / "b" / photo.name, "blue")  # has a name that is taken
    call = ("segment", pattern, second, "-b", colour_bundle, "--class", "red", "-o", tmp_path)
    assert run(*call, "--max-pixels", 1000) == 1
    printed = capsys.readouterr().out.replace("\n", "")
    assert "flag.png: expected at most 1000 pixels, got 60x30 = 1800" in printed
    assert len(list(tmp_path.glob("*.mask.png"))) == 2
    assert run(*call) == 0
    assert len(list(tmp_path.glob("*.mask.png"))) == 3


RED = ("segment", "{photo}", "-b", "{bundle}", "--classes", "red")
SHOW = ("segment", "--demo", "scenes")
LONG = "x" * 300  # file systems take 255 bytes
REFUSED = [
    (("segment", "{photo}", "-b", "{bundle}"), 2, "name at least one class"),
    (("segment", "--classes", "a"), 2, "try --demo"),
    (("segment", "{photo}", "--classes", "a"), 2, "--bundle NAME.zsseg"),
    ((*RED, "--wat"), 2, "No such option"),
    ((*RED, "--device", "cuda:9"), 4, "cuda:9"),
    ((*RED, "--precision", "fp8"), 4, "precision"),
    ((*RED[:-1], "gren"), 1, "'green'"),
    ((*RED[:-1], "@gone.txt"), 1, "gone.txt"),
    ((*RED[:-1], "@names"), 1, "names: line 2: expected plain text, got"),
    ((*RED[:-1], "red,gr\udcffn"), 1, "--classes[1]: expected plain text, got"),
    ((*RED[:-2], "--class", "a\x1b[1m"), 1, "--classes[0]: expected plain text, got"),
    ((*RED, "--background", "sk\udcff"), 1, "--background[0]: expected plain text, got"),
    ((*RED, "--template", "{{}} \x07"), 1, "--template[0]: expected plain text, got"),
    (("segment", "{photo}", "-b", "gone.zsseg", "--classes", "red"), 1, "found nothing"),
    (("segment", "gone.jpg", *RED[2:]), 1, "gone.jpg"),
    (("info", LONG), 1, "expected a bundle folder"),
    ((*RED, "--json", LONG), 2, "File name too long"),
    (("frobnicate",), 2, "frobnicate"),
    ((*SHOW, "--classes", "red ball,zebra"), 1, "got 'zebra'"),
    ((*SHOW, "--format", "xml"), 2, "--format: expected one of table, json, csv, png, coco"),
    ((*SHOW, "--min-region-score", "0.5"), 1, "--min-region-score: expected"),
    ((*SHOW, "--json", "gone/r.json"), 2, "--json: expected a folder that can be written to"),
    ((*SHOW, "--json", "in"), 2, "--json: expected a file to write, got a folder, in"),
    ((*SHOW, "--out", "in/flag.png"), 2, "flag.png is not a folder"),
    ((*SHOW, "--out", "in/flag.png/out"), 2, "Not a directory"),
    ((*SHOW, "--out", "/proc/out"), 2, "/proc is not writable"),  # also for root
    ((*SHOW, "--json", "/proc/r.json"), 2, "/proc is not writable"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED)
def test_errors_are_one_line(
    arguments, code, message, photo, colour_bundle, capsys, tmp_path, monkeypatch
):
    (tmp_path / "names").write_bytes(b"red\nblue\0\n")
    monkeypatch.chdir(tmp_path)
    if code == 2:  # told before a model is loaded
        monkeypatch.setattr(Engine, "__init__", None)
    assert run(*(a.format(photo=photo, bundle=colour_bundle) for a in arguments)) == code
    error = capsys.readouterr().err
    assert error.startswith("zsseg-rt: ")
    assert message in error
    assert error.count("\n") == 1


def test_debug_and_quiet_may_stand_anywhere(tmp_path, capfd):
    for words in (["--debug", "info", "missing.zsseg"], ["info", "missing.zsseg", "--debug"]):
        assert run(*words) == 1
        error = capfd.readouterr().err
        assert "Traceback" in error
        assert error.splitlines()[-1].startswith("zsseg-rt: missing.zsseg: expected a bundle")
    for words in (("--quiet", *SHOW), ("segment", "-q", *SHOW[1:])):
        assert run(*words, "-o", tmp_path) == 0
        assert capfd.readouterr() == ("", "")
    assert len(list(tmp_path.glob("*.mask.png"))) == len(SCENES)
    assert run("info", "demo-scenes") == 0  # and lasts for one call
    assert capfd.readouterr().out


def test_quiet_still_tells_errors_and_verbose_tells_more(tmp_path, capfd):
    assert run("segment", "--demo", "scenes", "--", "-q") == 1  # a photo of this name
    assert run("-q", "segment", tmp_path / "gone.png", "--demo", "scenes") == 1
    assert "gone.png" in capfd.readouterr().err
    assert run("segment", SCENES[0], "--demo", "scenes", "-o", tmp_path, "-v") == 0
    assert "image_encoder: openvino on cpu" in capfd.readouterr().err


def test_the_program_as_a_module_and_its_help(capsys):
    done = python("-m", "zsseg_rt", "--version")
    assert done.stdout == f"zsseg-rt {zsseg_rt.__version__}\n"
    assert run("--help") == 0
    printed = capsys.readouterr().out.replace("\n", "")
    for word in ("segment", "export", "import-checkpoint", "doctor", "--install-completion"):
        assert word in printed


def test_info_shows_and_checks(colour_bundle, capsys, tmp_path):
    report = tmp_path / "info.json"
    assert run("info", colour_bundle, "--names", "--check", "--json", report) == 0
    printed = capsys.readouterr().out
    assert "dark blue" in printed
    assert "mask_logits" in printed
    assert json.loads(report.read_text())["family"] == "dense"


OF_TRAINING = {
    "to train": "train --config zegclip_voc_inductive --dry-run",
    "to export RUN": "export trained RUN --out x.zsseg",
    "to evaluate RUN": "evaluate RUN --dataset folder --root flags --split all",
}


def test_commands_of_training_name_the_extra_they_need(tmp_path, flags):
    (tmp_path / "RUN").mkdir()
    calls = [call.split() for call in OF_TRAINING.values()]
    code = "import sys; sys.modules['torch'] = None; from zsseg_rt import cli; "
    code += f"print([cli.main(call) for call in {calls}])"
    paths = {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = python("-c", code, cwd=tmp_path, more_env=paths)
    assert done.stdout == "[4, 4, 4]\n"
    for line, purpose in zip(done.stderr.splitlines(), OF_TRAINING, strict=True):
        assert line.startswith(f"zsseg-rt: torch: expected to be installed {purpose}")
        assert "pip install '.[train]'" in line


def test_format_json_is_a_line_per_photo_and_csv_a_row_per_class(tmp_path, capfd):
    gone = tmp_path / "broken.png"
    gone.write_bytes(b"none")
    call = (*SHOW, *SCENES, gone, "--classes", "ball,wall", "-o", tmp_path)
    assert run(*call, "--format", "json") == 1
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [bool(line["error"]) for line in lines] == [False] * len(SCENES) + [True]
    assert lines[0]["photo"] == SCENES[0]
    assert {entry["name"] for entry in lines[0]["classes"]} <= {"ball", "wall"}
    assert "background (added" in err
    assert run(*SHOW, "--format", "csv", "-o", tmp_path) == 0
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert list(rows[0]) == ["photo", "class", "share", "pixels", "mask", "error"]
    for photo in SCENES:
        shares = [float(row["share"]) for row in rows if row["photo"] == photo]
        assert sum(shares) == pytest.approx(1.0, abs=1e-4)


def test_formats_of_other_programs_are_written_beside_the_images(tmp_path, capfd):
    photo, stem = SCENES[0], Path(SCENES[0]).stem
    call = (*SHOW, photo, "--class", "ball", "--class", "wall", "-o", tmp_path)
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
    labels = read_label_png(tmp_path / f"{stem}.mask.png")
    (tmp_path / "images" / "sub").mkdir(parents=True)
    names = ["a.png", "sub/b.png"]
    two = [shutil.copy(photo, tmp_path / "images" / name) for name in names]
    assert run(*SHOW, *two, *call[-6:], "--format", "coco") == 0
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == names  # from their folder
    assert [(c["id"], c["name"]) for c in coco["categories"]] == [(1, "ball"), (2, "wall")]
    assert {a["image_id"] for a in coco["annotations"]} == {a["id"] for a in coco["images"]}
    for annotation in coco["annotations"]:
        assert annotation["area"] == (labels + 1 == annotation["category_id"]).sum()


def test_the_bundle_that_ships_has_a_name(tmp_path):
    bundles = {"demo": "photos", "demo-photos": "photos", "demo-scenes": "scenes"}
    for name, bundle in bundles.items():
        assert find_bundle(name) == demo_bundle(bundle)
        assert run("info", name) == 0
    call = ("segment", demo_photos()[0], "--bundle", "demo", "-o", tmp_path, "--format", "png")
    assert run(*call, "--classes", "") == 2
    assert run(*call, "--classes", demo_classes()[0], "--precision", "fp32") == 0


ODD = ["\x1b[2J\r\n", "a\u2028b\u2029", "\u202e\u2066", "\x7f\x85\x9b", "\udce9", "\U000e0001",
       "\ufeff"]  # fmt: skip
PLAIN = ["caf\u00e9", "\u0645\u06cc\u200c\u062e", "\U0001f468\u200d\U0001f466", "9\u202fAM",
         "\u30b0\u3000a"]  # fmt: skip


@pytest.mark.parametrize("text", ODD + PLAIN)
def test_names_stay_on_their_line_and_json_means_what_it_meant(text):
    shown, document = printable(text), json_text({text: [text]}, indent=1)
    assert json.loads(document) == {text: [text]}
    assert (shown == text) == (text in PLAIN)
    for line in (shown, *document.split("\n")):
        assert line.splitlines() == [line]
        assert not {"Cc", "Zl", "Zp", "Cs"} & {unicodedata.category(c) for c in line}
        assert not set("\u202e\u2066\ufeff") & set(line)


def test_tables_and_lines_of_the_log_escape_alike(capsys):
    from rich.table import Table

    table = Table("name", box=None)
    table.add_row("a\x1b[31m\n\u202eb")
    say(table, "a\x1b[31m\n\u202eb", "[red]car[/]")
    record = logging.LogRecord("x", 30, "", 0, "%s", ("a\x1b[31m\n\u202eb",), None)
    assert LinesAboveStatus(sys.stderr).format(record) == r"a\x1b[31m\n\u202eb"
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed == ["name", *[r"a\x1b[31m\n\u202eb"] * 2, "[red]car[/]"]


def test_commas_and_semicolons(tmp_path):
    (tmp_path / "names").write_text("sofa, couch\nroad")
    for classes, single, names in (
        ("road, car", [], ["road", "car"]),
        ("road; sofa, couch", [], ["road", ["sofa", "couch"]]),
        ("sofa, couch;", [], [["sofa", "couch"]]),
        (None, ["sofa, couch", "road"], [["sofa", "couch"], "road"]),
        (f"@{tmp_path / 'names'}", [], [["sofa", "couch"], "road"]),
        ("road", ["sofa,couch"], ["road", ["sofa", "couch"]]),
    ):
        assert read_classes(classes, single) == names


def test_synonyms_in_an_option_are_remarked_upon(tmp_path, capsys):
    call = (*SHOW, SCENES[0], "--class", "ball, blue ball", "-o", tmp_path)
    assert run(*call, "--json", tmp_path / "r.json") == 0
    printed = capsys.readouterr().err
    assert "--class 'ball, blue ball': one class, 'ball', also called blue ball" in printed
    assert json.loads((tmp_path / "r.json").read_text())["engine"]["names"] == ["ball"]


def test_a_data_set_s_class_with_a_comma_can_be_named():
    for words in ("pavement, sidewalk", "pavement, sidewalk;", "sidewalk"):
        table = class_table("camvid").with_unseen(flat_names(words))
        assert [table.names[index] for index in table.unseen] == ["pavement, sidewalk"]


OF_ENGINES = [
    f.metadata["option"].name(f.name) for f in fields(EngineConfig) if f.metadata["option"]
]
# What each option is refused with.
BAD_VALUES = {
    "--device": "gpu", "--backend": "onnx", "--precision": "fp64", "--unknown-below": "2",
    "--min-region-score": "-1", "--head-classes": "few", "--max-candidates": "0",
    "--windows": "wide", "--max-windows": "0", "--resize": "crop", "--threads": "-1",
}  # fmt: skip


def options_of(*words):
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    return {option for param in command.params for option in param.opts}


def test_settings_are_described_and_options_of_their_commands():
    lacking = {"segment": (), "stream": (), "serve": (), "evaluate": ("--unknown-below",)}
    for command, lacks in (lacking | {"profile": OF_ENGINES[3:-1]}).items():
        assert set(OF_ENGINES) - options_of(command) == set(lacks)
    for cls in (EngineConfig, ServerSettings, ExportOptions):
        listed = cls.__doc__.partition("Attributes:")[2].partition("Raises:")[0]
        assert all(f"\n        {field.name}: " in listed for field in fields(cls))
    for cls, command in ((ServerSettings, ("serve",)), (ExportOptions, ("export", "dense"))):
        own = [field for field in fields(cls) if field.metadata["option"]]
        names = {field.metadata["option"].name(field.name) for field in own}
        assert names - options_of(*command) <= {"--precision"}


def test_a_bad_value_is_misuse_and_named_by_its_option(capsys):
    for option in OF_ENGINES:
        assert run("segment", "--demo", option, BAD_VALUES[option]) == 2
        assert capsys.readouterr().err.startswith(f"zsseg-rt: {option}: expected")


@pytest.fixture
def flags(tmp_path):
    return write_flags(tmp_path / "flags", "red", "green", "blue, navy [unseen]", count=4)


def evaluate(bundle, flags, *arguments):
    return run("evaluate", bundle, "--dataset", "folder", "--root", flags, "--split", "all",
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


def test_names_unseen_and_options_reach_the_data_set(colour_bundle, flags, tmp_path):
    report, names = tmp_path / "report.json", tmp_path / "names.txt"

    def rows(*arguments):
        assert evaluate(colour_bundle, flags, "--json", report, *arguments) == 0
        return json.loads(report.read_text())["classes"]

    names.write_text("red\ngreen, orange\nnavy\n")  # the question, not the classes
    first, second, third = rows("--classes", f"@{names}", "--rename", "red=blue",
                                "--rename", "navy=red")  # fmt: skip
    asked = [row["asked_as"] for row in (first, second, third)]
    assert asked == ["blue", "green, orange", "red"]
    assert first["iou_percent"] == 0.0
    assert second["iou_percent"] > 90
    assert [row["seen"] for row in rows("--unseen", "red,navy")] == [False, True, False]
    shifted = rows("--option", "zero_is_unlabelled=true")  # then the last class is in no mask
    assert shifted[2]["true_pixels"] == 0


@pytest.mark.parametrize(("arguments", "code", "message"), [
    ([], 4, "PIL: expected to be installed to read masks"),
    (["--protocol", "crop"], 2, "--protocol: expected one of whole, slide"),
    (["--protocol", "slide"], 1, "protocol: expected 'whole' for a bundle"),
    (["--classes", "red,blue"], 2, "--classes: expected 3 names"),
    (["--rename", "red"], 2, "--rename: expected 'OLD=NEW', got 'red'"),
    (["--rename", "pink=red"], 1, "expected old names from red, green, blue"),
    (["--option", "x"], 2, "--option: expected NAME=VALUE, got 'x'"),
    (["--option", "speed=1"], 1, "speed"),
    (["--limit", "0"], 2, "limit"),
    (["--split", "val"], 1, "split: expected 'all'"),
    (["--dataset", "nonsense"], 1, "camvid"),
    (["--confusion", "/nowhere/file"], 2, "expected a folder that can be written to"),
])  # fmt: skip
def test_errors_say_what_to_do(colour_bundle, flags, capsys, monkeypatch, arguments, code, message):
    if code == 4:
        monkeypatch.setitem(sys.modules, "PIL", None)
    assert evaluate(colour_bundle, flags, *arguments) == code
    assert message in capsys.readouterr().err


def test_regions_can_be_skipped(flags):
    bundle = Path(__file__).parents[1] / "bundles" / "v1" / "proposals.zsseg"
    call = ("evaluate", bundle, "--min-region-score", 0.5, "--classes", "name 0,name 1,name 2")
    assert run(*call, "--dataset", "folder", "--root", flags, "--split", "all") == 0


LIMIT = 60.0  # seconds, on a busy machine


def test_an_interrupted_run_keeps_a_report_and_says_how_to_go_on(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for index in range(500):  # more photos than it will ever do
        (tmp_path / "in" / f"{index}.png").symlink_to(SCENES[0])
    call = (*SHOW, tmp_path / "in", "-o", tmp_path / "out", "--json", tmp_path / "r.json")
    with ctrl_c_once((tmp_path / "out" / "zsseg_journal.jsonl").is_file):
        assert run(*call, "--threads", 1) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "of 500 photos are done. Add --resume to go on from there." in error.splitlines()[-1]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["interrupted"] is True
    assert len(report["photos"]) < 500


def test_a_useless_cache_is_told_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    caplog.set_level(logging.WARNING)
    with Engine(demo_bundle("scenes"), EngineConfig(cache_dir=tmp_path / "file")) as engine:
        engine.set_classes([f"red {word}" for word in ("ball", "box", "cone", "star", "ring")])
        engine.set_classes(["blue sky"])
    (record,) = caplog.records
    assert "file: cannot be used as the cache" in record.getMessage()
    assert "Set ZSSEG_HOME" in record.getMessage()


INTERRUPTED_IMPORT = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "zsseg_rt.cli.segment":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from zsseg_rt.__main__ import run
sys.exit(run())
"""


def test_an_interrupt_while_modules_are_loaded_is_one_line():
    done = python("-c", INTERRUPTED_IMPORT)
    assert (done.returncode, done.stderr) == (1, "zsseg-rt: interrupted\n")


def test_an_interrupt_while_opencv_is_loaded_is_none_of_its_absence(tmp_path, monkeypatch):
    """NumPy's C interface raises an ImportError in place of whatever came up in its import."""
    (tmp_path / "cv2.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    imread = len(range(9))\n"
        "except KeyboardInterrupt:\n    raise ImportError('numpy.core.multiarray failed')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        import_opencv("to read photos")
    assert signal.getsignal(signal.SIGINT) is before
    sys.modules.pop("cv2", None)


def test_a_device_is_written_into_and_stays_one(tmp_path, photo, capsys):
    """To root, a rename over /dev/null is as good as any other."""
    pipe, texts = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: texts.append(pipe.read_bytes()))
    reader.start()
    call = (*SHOW, photo, "-o", tmp_path / "out", "--json")
    assert run(*call, pipe) == 0
    reader.join(LIMIT)
    assert len(json.loads(texts[0])["photos"]) == 1
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # so that a failure of this test does not take it away
    assert run(*call, full) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert full.is_symlink()


def test_a_stream_is_ready_with_its_first_frame_and_alive_with_later_ones(tmp_path):
    call = [sys.executable, "-m", "zsseg_rt", "-q", "stream", "--demo", "scenes", "--seconds", "20"]
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(LIMIT)
        with subprocess.Popen(call, env=environment) as child:
            try:
                assert systemd.recv(100) == b"READY=1"
                assert systemd.recv(100) == b"WATCHDOG=1"
            finally:
                child.kill()


def test_abstract_names_are_understood_and_lost_sockets_reported_once(tmp_path, caplog):
    name = f"\0zsseg-test-{id(object())}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name)
        receiver.settimeout(60)
        Notifier({"NOTIFY_SOCKET": "@" + name[1:]}).frame()
        assert receiver.recv(100) == b"READY=1"
    Notifier({}).frame()
    assert not caplog.text
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    for _ in range(3):
        notifier.frame()
    assert caplog.text.count("NOTIFY_SOCKET: cannot report frames") == 1
