"""The command line as people type it: outputs, tables, exit codes, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import zsseg_rt
from support.colour_words import COLOUR_WORDS
from support.command_line import run
from zsseg_rt import cli


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))


@pytest.fixture
def photo(tmp_path):
    return write_photo(tmp_path / "in" / "flag.png", "red", "white", "blue")


def write_photo(path, *names):
    path.parent.mkdir(exist_ok=True)
    columns = [np.full((30, 20, 3), COLOUR_WORDS[name][::-1], np.uint8) for name in names]
    cv2.imwrite(str(path), np.concatenate(columns, axis=1))
    return path


def test_segment_writes_pictures_table_and_json(photo, colour_bundle, tmp_path, capsys):
    out, report = tmp_path / "out", tmp_path / "report.json"
    code = run("segment", photo, "--bundle", colour_bundle, "--classes", "blue, red,white",
               "--out", out, "--json", report)  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    assert "red" in printed
    assert "%" in printed
    overlay = cv2.imread(str(out / "flag.overlay.png"))
    assert overlay.shape == (30, 60, 3)
    written = json.loads(report.read_text())
    (entry,) = written["photos"]
    assert entry["size_hw"] == [30, 60]
    assert {c["name"] for c in entry["classes"]} == {"red", "white", "blue"}
    assert sum(c["pixels"] for c in entry["classes"]) == 30 * 60
    assert written["engine"]["names"] == ["blue", "red", "white"]
    from zsseg_rt.results.visualize import palette

    mask = cv2.imread(str(out / "flag.mask.png"), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(mask[15, [10, 30, 50]], palette(["red", "white", "blue"]))


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
    assert run("segment", pattern, "-b", colour_bundle, "--classes", "red", "-o", out) == 0


def test_resume_skips_what_is_done_with_the_same_settings(photo, colour_bundle, tmp_path):
    out, report = tmp_path / "out", tmp_path / "r.json"
    arguments = ("segment", photo, "-b", colour_bundle, "-o", out, "--resume", "--json", report)
    resumed = []
    for classes in ("red,blue", "red,blue", "red,green"):
        assert run(*arguments, "--classes", classes) == 0
        resumed.append(json.loads(report.read_text())["photos"][0]["resumed"])
    assert resumed == [False, True, False]
    (out / "flag.mask.png").unlink()
    assert run(*arguments, "--classes", "red,green") == 0
    assert (out / "flag.mask.png").is_file()


def test_class_file_synonyms_and_unknown(photo, colour_bundle, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("# colours\nblue, dark blue\n\nred\n")
    report = tmp_path / "r.json"
    code = run("segment", photo, "-b", colour_bundle, "--classes", f"@{names}",
               "--background", "white", "-o", tmp_path / "out", "--json", report)  # fmt: skip
    assert code == 0
    written = json.loads(report.read_text())
    assert written["engine"]["names"] == ["blue", "red"]
    assert written["photos"][0]["unknown_share"] == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (["--classes", "@names"], "names: line 2"),
        (["--classes", "red,gr\udcffn"], "--classes[1]"),
        (["--class", "a\x1b[1m"], "--classes[0]"),
        (["--classes", "red", "--background", "sk\udcff"], "--background[0]"),
        (["--classes", "red", "--template", "{} \x07"], "--template[0]"),
    ],
)
def test_names_that_are_no_plain_text_are_named(
    photo, colour_bundle, tmp_path, capsys, monkeypatch, options, argument
):
    (tmp_path / "names").write_bytes(b"red\nblue\0\n")
    monkeypatch.chdir(tmp_path)
    assert run("segment", photo, "-b", colour_bundle, *options, "-o", tmp_path / "out") == 1
    assert f"zsseg-rt: {argument}: expected plain text, got" in capsys.readouterr().err


def test_names_with_brackets_are_shown_as_typed(photo, colour_bundle, tmp_path, capsys):
    import dataclasses

    from zsseg_rt.cli.segment import print_table
    from zsseg_rt.integrations.batch import PhotoResult

    entry = {"name": "[red]car[/]", "index": 0, "pixels": 1, "share": 1.0, "colour": "#102030"}
    result = PhotoResult(photo="a[1].jpg", size_hw=(1, 1), classes=(entry,))
    print_table(dataclasses.replace(result, times={"total": 1.0}))
    printed = capsys.readouterr().out
    assert "[red]car[/]" in printed
    assert "a[1].jpg" in printed


def test_photos_with_one_stem_get_two_names(colour_bundle, tmp_path):
    first = write_photo(tmp_path / "a" / "x.png", "red")
    second = write_photo(tmp_path / "b" / "x.png", "blue")
    out = tmp_path / "out"
    assert run("segment", first, second, "-b", colour_bundle, "--class", "red", "-o", out) == 0
    assert len(list(out.glob("*.mask.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("segment", "{photo}", "-b", "{bundle}"), 2, "name at least one class"),
        (("segment", "{photo}", "-b", "{bundle}", "--classes", "red", "--device", "gpu"), 2,
         "device: expected"),
        (("segment", "{photo}", "-b", "{bundle}", "--classes", "red", "--wat"), 2,
         "No such option"),
        (("segment", "{photo}", "-b", "{bundle}", "--classes", "red", "--device", "cuda:9"), 4,
         "cuda:9"),
        (("segment", "{photo}", "-b", "{bundle}", "--classes", "red", "--precision", "fp8"), 4,
         "precision"),
        (("segment", "{photo}", "-b", "gone.zsseg", "--classes", "red"), 1, "found nothing"),
        (("segment", "gone.jpg", "-b", "{bundle}", "--classes", "red"), 1, "gone.jpg"),
        (("segment", "{photo}", "-b", "{bundle}", "--classes", "gren"), 1, "'green'"),
        (("segment", "{photo}", "-b", "{bundle}", "--classes", "@gone.txt"), 1, "gone.txt"),
        (("info", "gone.zsseg"), 1, "found nothing"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)  # fmt: skip
def test_errors_are_one_line(arguments, code, message, photo, colour_bundle, capsys):
    filled = [a.format(photo=photo, bundle=colour_bundle) for a in arguments]
    assert run(*filled) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(place, capsys):
    arguments = ["info", "missing.zsseg"]
    arguments.insert(place, "--debug")
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("zsseg-rt: missing.zsseg: expected a bundle")


def test_version_as_a_module():
    command = [sys.executable, "-m", "zsseg_rt", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"zsseg-rt {zsseg_rt.__version__}\n"


def test_info_shows_and_checks(colour_bundle, capsys, tmp_path):
    report = tmp_path / "info.json"
    assert run("info", colour_bundle, "--names", "--check", "--json", report) == 0
    printed = capsys.readouterr().out
    assert "dark blue" in printed
    assert "mask_logits" in printed
    assert json.loads(report.read_text())["family"] == "dense"


def test_doctor_reports_every_topic(capsys, tmp_path):
    report = tmp_path / "doctor.json"
    assert run("doctor", "--json", report) == 0
    findings = json.loads(report.read_text())["findings"]
    printed = "".join(capsys.readouterr().out.split())
    for finding in findings:
        assert finding["remedy"].split(" ")[-1].split("/")[0] in printed
    topics = {f["topic"] for f in findings}
    assert {"python", "native core", "CUDA", "TensorRT", "OpenVINO", "OpenCV", "cache"} <= topics
    for finding in findings:
        assert finding["status"] != "absent" or finding["remedy"] or finding["topic"] == "Jetson"


def test_help_names_the_commands(capsys):
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for command in ("segment", "export", "import-checkpoint", "info", "doctor"):
        assert command in printed


@pytest.mark.parametrize(
    ("arguments", "purpose"),
    [
        (["train", "--config", "zegclip_voc_inductive", "--dry-run"], "to train"),
        (["export", "trained", "RUN", "--out", "x.zsseg"], "to export RUN"),
        (
            ["evaluate", "RUN", "--dataset", "folder", "--root", ".", "--split", "all"],
            "to evaluate RUN",
        ),
    ],
)
def test_commands_of_training_name_the_extra_they_need(arguments, purpose, tmp_path):
    (tmp_path / "RUN").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for folder in ("images", "masks"):  # what evaluate looks at first
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "0.png"), np.zeros((4, 4), np.uint8))
    code = "import sys; sys.modules['torch'] = None; from zsseg_rt import cli; "
    call = [sys.executable, "-c", f"{code}sys.exit(cli.main({arguments!r}))"]
    paths = {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run(
        call, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    expected = f"torch: expected to be installed {purpose}, got nothing. Run: pip install"
    assert done.stderr.strip() == f"zsseg-rt: {expected} '.[train]' in a checkout of zsseg_rt"
