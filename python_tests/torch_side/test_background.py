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

KNOWN = ["sky", "wall", "grass", "floor"]  # of the published phrases
MANY = "red ball,green box,blue cone,white star"
THERE = "yellow sand,blue water,yellow brick wall,red striped ball,orange wooden cone"
ADDED = "background (added to 1 class): sky, wall, grass, floor"


@pytest.mark.parametrize(
    ("classes", "given", "background", "printed", "absent"),
    [
        ("ball", None, KNOWN, (ADDED, "--background none"), "remark: 'ball' takes"),
        ("ball", "none", [], ("remark: 'ball' takes 100.0% of the photo",), "added to"),
        ("ball", "grey wall, sky", ["grey wall", "sky"], (), "background ("),
        (None, None, [], (), "background"),
        (MANY, "auto", KNOWN, ("asked for by --background auto",), "remark"),
        (
            "purple ring",
            THERE,
            THERE.split(","),
            ("remark: nearly every pixel is unknown",),
            "takes",
        ),
    ],
)
def test_the_command_says_what_competes_with_the_classes(
    classes, given, background, printed, absent, tmp_path, capsys
):
    photo, report = demo_photos("scenes")[classes == "purple ring"], tmp_path / "r.json"
    call = ["segment", photo, "--demo", "scenes", "-o", tmp_path / "out", "--json", report]
    call += ["--classes", classes] if classes else []
    assert run(*call, *(["--background", given] if given else [])) == 0
    assert json.loads(report.read_text())["engine"]["background"] == background
    out = capsys.readouterr().out
    assert [text for text in printed if text not in out] == []
    assert absent not in out
    assert "knows only drawings" not in out


def test_background_auto_in_python():
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu", use_cache=False)) as engine:
        assert list(engine.set_classes(["ball"], background="auto").background) == KNOWN
        seg = engine.segment(read_photo(demo_photos("scenes")[0]))
        assert 0.1 < (seg.labels == seg.unknown).mean() < 1
        names = ["red brick wall", ["ball", "blue sky"]]  # phrases that share a word do not compete
        assert engine.set_classes(names, background="auto").background == ("grass", "floor")
        with refused(VocabularyError, "background"):
            engine.set_classes(["ball"], background="sky")


def test_a_full_text_encoder_takes_all_phrases(zegclip_bundle):
    with Engine(zegclip_bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        background = engine.set_classes(["white sand", "oak trees"], background="auto").background
    assert set(background) == set(BACKGROUND_PHRASES) - {"sands", "tree"}


def test_a_bundle_with_a_list_of_names_takes_those_it_has(colour_bundle, tmp_path, capsys):
    with Engine(colour_bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        assert engine.set_classes(["red"], background="auto").background == ()
    photo = demo_photos("scenes")[0]
    call = ("segment", photo, "-b", colour_bundle, "--class", "red", "-o", tmp_path)
    assert run(*call, "--background", "auto") == 0
    assert "none of the published phrases fits" in capsys.readouterr().out


def test_photographs_shown_to_the_demo_are_told_apart(tmp_path, capsys):
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.full((20, 30, 3), 90, np.uint8))
    assert run("segment", photo, "--demo", "scenes", "-o", tmp_path) == 0
    assert "knows only drawings" in capsys.readouterr().out
