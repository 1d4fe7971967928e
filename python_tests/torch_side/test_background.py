"""Few classes compete with published background phrases, and what is easily misread is told."""

import json

import cv2
import numpy as np
import pytest

from support.command_line import run
from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig, VocabularyError
from zsseg_rt.demo import demo_photos
from zsseg_rt.photos import read_photo
from zsseg_rt.text.class_names import BACKGROUND_PHRASES


@pytest.fixture(scope="module")
def engine():
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu", use_cache=False)) as engine:
        yield engine


def one_class(folder, *options):
    """What ``segment`` writes for one of the demo's pictures and one class."""
    report = folder / "r.json"
    call = (
        "segment",
        demo_photos("scenes")[0],
        "--demo",
        "scenes",
        "--classes",
        "ball",
        "-o",
        folder / "out",
    )
    assert run(*call, "--json", report, *options) == 0
    return json.loads(report.read_text())


def test_one_class_does_not_take_everything(tmp_path, capsys):
    written = one_class(tmp_path)
    assert written["engine"]["background"] == ["sky", "wall", "grass", "floor"]  # it knows these
    assert written["photos"][0]["classes"][0]["share"] < 0.9
    assert written["photos"][0]["unknown_share"] > 0.1
    printed = capsys.readouterr().out
    assert "background (added to 1 class): sky, wall, grass, floor" in printed
    assert "--background none" in printed
    assert "remark: 'ball' takes" not in printed


def test_background_none_leaves_it_out_and_the_class_that_takes_all_is_remarked_upon(
    tmp_path, capsys
):
    written = one_class(tmp_path, "--background", "none")
    assert written["engine"]["background"] == []
    assert written["photos"][0]["classes"][0]["share"] == 1.0
    printed = capsys.readouterr().out
    assert "remark: 'ball' takes 100.0% of the photo" in printed
    assert "added to" not in printed


def test_phrases_of_the_user_s_own_are_taken_as_they_are(tmp_path, capsys):
    written = one_class(tmp_path, "--background", "grey wall, sky")
    assert written["engine"]["background"] == ["grey wall", "sky"]
    assert "background (" not in capsys.readouterr().out


def test_many_classes_are_left_alone(tmp_path, capsys):
    assert run("segment", "--demo", "scenes", "-o", tmp_path) == 0
    assert "background" not in capsys.readouterr().out


def test_many_classes_get_it_on_request(tmp_path, capsys):
    report = tmp_path / "r.json"
    names = "red ball,green box,blue cone,white star"
    call = ("segment", "--demo", "scenes", "--classes", names, "--background", "auto")
    assert run(*call, "-o", tmp_path / "out", "--json", report) == 0
    assert json.loads(report.read_text())["engine"]["background"][0] == "sky"
    assert "asked for by --background auto" in capsys.readouterr().out


def test_background_auto_in_python(engine):
    vocabulary = engine.set_classes(["ball"], background="auto")
    assert vocabulary.background == ("sky", "wall", "grass", "floor")
    seg = engine.segment(read_photo(demo_photos("scenes")[0]))
    assert (seg.labels == seg.unknown).any()


def test_phrases_that_share_a_word_with_a_class_do_not_compete(engine):
    names = ["red brick wall", ["ball", "blue sky"]]
    assert engine.set_classes(names, background="auto").background == ("grass", "floor")
    assert "sands" in BACKGROUND_PHRASES


def test_a_full_text_encoder_takes_all_phrases(zegclip_bundle):
    with Engine(zegclip_bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        background = engine.set_classes(["white sand", "oak trees"], background="auto").background
    assert set(background) == set(BACKGROUND_PHRASES) - {"sands", "tree"}


def test_a_bundle_with_a_list_of_names_takes_those_it_has(colour_bundle, tmp_path, capsys):
    with Engine(colour_bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        assert engine.set_classes(["red"], background="auto").background == ()
    call = (
        "segment",
        demo_photos("scenes")[0],
        "-b",
        colour_bundle,
        "--class",
        "red",
        "-o",
        tmp_path,
    )
    assert run(*call, "--background", "auto") == 0
    assert "none of the published phrases fits" in capsys.readouterr().out


def test_another_string_is_refused(engine):
    with refused(VocabularyError, "background"):
        engine.set_classes(["ball"], background="sky")


def test_photographs_shown_to_the_demo_are_told_apart(tmp_path, capsys):
    sentence = "knows only drawings"
    assert run("segment", "--demo", "scenes", "-o", tmp_path) == 0
    assert sentence not in capsys.readouterr().out
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.full((20, 30, 3), 90, np.uint8))
    assert run("segment", photo, "--demo", "scenes", "-o", tmp_path) == 0
    assert sentence in capsys.readouterr().out


def test_a_picture_without_any_class_is_remarked_upon(tmp_path, capsys):
    there = "yellow sand,blue water,yellow brick wall,red striped ball,orange wooden cone"
    call = (
        "segment",
        demo_photos("scenes")[1],
        "--demo",
        "scenes",
        "--classes",
        "purple ring",
        "-o",
        tmp_path,
    )
    assert run(*call, "--background", there) == 0
    assert "remark: nearly every pixel is unknown" in capsys.readouterr().out
