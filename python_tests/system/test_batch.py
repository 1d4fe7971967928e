"""Many photos: lanes change nothing, ``--resume`` believes files, a bad photo stays alone."""

import contextlib
import json
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest

from support.colour_words import COLOUR_WORDS
from support.command_line import python, run
from support.errors import refused
from support.fakes import edit_manifest
from support.picture_files import random_photos
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, EngineStateError
from zsseg_rt.integrations import batch
from zsseg_rt.integrations.batch import JOURNAL, Budget, lanes_for, segment_photos
from zsseg_rt.photos import find_photos
from zsseg_rt.runtime.lane_pool import LanePool

NAMES = ["red", "blue", "green", "white"]
LIMIT = 30.0  # seconds


@pytest.fixture(scope="module")
def engine(colour_bundle):
    with Engine(colour_bundle, EngineConfig(use_cache=False)) as engine:
        engine.set_classes(NAMES)
        yield engine


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    write_photo(tmp_path / "in" / "a.png", "red")
    write_photo(tmp_path / "in" / "b.png", "blue")
    return tmp_path / "in"


def write_photo(path, name):
    cv2.imwrite(str(path), np.full((24, 32, 3), COLOUR_WORDS[name][::-1], np.uint8))


@pytest.fixture
def many(tmp_path):
    return random_photos(tmp_path / "many", 12, damaged=5)


@pytest.fixture
def engine_with(colour_bundle):
    with contextlib.ExitStack() as opened:

        def open_engine(num_lanes, **settings):
            config = EngineConfig(use_cache=False, num_lanes=num_lanes, **settings)
            engine = opened.enter_context(Engine(colour_bundle, config))
            engine.set_classes(NAMES)
            return engine

        yield open_engine


def resumed(engine, folder, out, **settings):
    results = segment_photos(engine, find_photos([str(folder)]), out, resume=True, **settings)
    assert [result.error for result in results] == [None] * len(results)
    return {Path(result.photo).name for result in results if result.resumed}


def images_in(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != JOURNAL}


def test_lanes_and_channel_order_change_nothing(engine_with, many, tmp_path):
    photos, outcomes = find_photos([str(many)]), []
    for lanes, order in ((1, "rgb"), (1, "bgr"), (3, "rgb")):
        engine, out, listed = engine_with(lanes, channel_order=order), tmp_path / order, {}
        note = lambda one, _, to=listed: to.setdefault(one.photo, one)  # noqa: E731
        results = segment_photos(engine, photos, out / str(lanes), on_done=note)
        assert [*listed.values()] == results
        assert [*listed] == [str(photo) for photo in photos]
        assert [bool(result.error) for result in results] == [i == 5 for i in range(12)]
        outcomes.append(([result.classes for result in results], images_in(out / str(lanes))))
        if order == "rgb":
            again = segment_photos(engine, photos, out / "1", resume=True)
            assert [result.resumed for result in again] == [i != 5 for i in range(12)]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(outcomes[0][1]) == 22
    with engine.lane(), refused(EngineStateError, "lanes"):
        segment_photos(engine, photos, tmp_path / "out")


def test_all_lanes_are_used(engine_with, many, tmp_path, monkeypatch):
    engine = engine_with(2)
    meeting = threading.Barrier(2, timeout=LIMIT)  # fails if photos are labelled one by one
    label = LanePool.segment

    def together(lanes, frame):
        meeting.wait()
        return label(lanes, frame)

    monkeypatch.setattr(LanePool, "segment", together)
    (many / "05.png").unlink()
    (many / "11.png").unlink()
    results = segment_photos(engine, find_photos([str(many)]), tmp_path / "out")
    assert [result.error for result in results] == [None] * 10


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left"), MemoryError("9 GiB"), KeyError(), ArgumentError("frame: wide")],
)
def test_a_photo_that_fails_is_the_only_one_but_without_a_package_none_is_done(
    failure, engine, folder, tmp_path, monkeypatch
):
    plain = LanePool.segment

    def fail_for_red(lanes, frame):
        if frame[0, 0, 0] > frame[0, 0, 2]:
            raise failure
        return plain(lanes, frame)

    monkeypatch.setattr(LanePool, "segment", fail_for_red)
    photos = find_photos([str(folder)])
    first, second = segment_photos(engine, photos, tmp_path / "out")
    assert first.error.startswith(f"{photos[0]}: ")
    assert first.error.count("a.png") == 1
    assert isinstance(failure, ArgumentError) or type(failure).__name__ in first.error
    assert second.error is None
    failure = BackendUnavailableError("cv2: expected OpenCV")
    with refused(BackendUnavailableError, "cv2"):
        segment_photos(engine, photos, tmp_path / "out")


def test_an_interrupted_run_begins_no_further_photo(engine_with, many, tmp_path):
    out = tmp_path / "out"

    def interrupt(result, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_photos(engine_with(2), find_photos([str(many)]), out, on_done=interrupt)
    done = len(images_in(out)) // 2
    assert 1 <= done <= 9  # the first, and those under way or waiting for their turn
    assert len((out / JOURNAL).read_bytes().splitlines()) == done


def test_lanes_of_the_command(colour_bundle, many, tmp_path, capsys):
    arguments = ("segment", many, "-b", colour_bundle, "--class", "red")
    for lanes in (0, 3):
        out = tmp_path / f"out {lanes}"
        assert run(*arguments, "-o", out, "--lanes", lanes) == 1
        assert "1 of 12 photos failed" in capsys.readouterr().err
    assert images_in(tmp_path / "out 0") == images_in(tmp_path / "out 3")
    assert run(*arguments, "-o", out, "--lanes", 65) == 2


def test_lanes_for_photos():
    torch = {"backend": "torch", "num_threads": 64}
    for photos, config, lanes in (
        (1, {}, 1), (0, {}, 1), (100, {"num_threads": 2}, 2), (100, {"num_threads": 64}, 4),
        (3, {"num_threads": 64}, 3), (100, torch, 1),
    ):  # fmt: skip
        assert lanes_for(photos, EngineConfig(device="cpu", **config)) == lanes


def test_overlays_as_jpeg(colour_bundle, many, tmp_path):
    arguments = ("segment", many / "03.png", "-b", colour_bundle, "--classes", "red,blue")
    images = []
    for kind in ("png", "jpg"):
        out = tmp_path / kind
        assert run(*arguments, "-o", out, "--overlay-format", kind) == 0
        assert sorted(images_in(out)) == ["03.mask.png", f"03.overlay.{kind}"]
        images.append(cv2.imread(str(out / f"03.overlay.{kind}")).astype(int))
    assert np.abs(images[0] - images[1]).mean() < 8
    assert run(*arguments, "-o", tmp_path / "png", "--overlay-format", "jpg", "--resume") == 0
    assert (tmp_path / "png" / "03.overlay.jpg").exists()
    assert run(*arguments, "--overlay-format", "gif") == 2


def test_a_budget_is_never_exceeded():
    budget, lock, total, most = Budget(10), threading.Lock(), [0], [0]

    def change(by):
        with lock:
            total[0] += by
            most[0] = max(most[0], total[0])

    def work(amount):
        for _ in range(200):
            with budget.taken(amount):
                change(min(amount, 10))
                change(-min(amount, 10))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, (1, 3, 4, 7, 10, 25), timeout=LIMIT))
    assert (most[0] <= 10, total) == (True, [0])


def test_the_journal_s_key_is_made_from_every_setting(engine, folder, tmp_path, monkeypatch):
    """A setting that is added later is in it, unless it is said to leave images as they are."""
    settings, key, out = batch.PhotoSettings, batch.settings_key, tmp_path / "out"
    usual = key(engine, settings())
    for changed in ({"alpha": 0.25}, {"overlay_format": "jpg"}, {"legend": True}):
        assert key(engine, settings(**changed)) != usual
    assert key(engine, settings(max_pixels=5)) == usual
    for field in fields(EngineConfig):
        with monkeypatch.context() as patched:
            config = object.__new__(EngineConfig)
            config.__dict__.update({**vars(engine.config), field.name: "another"})
            patched.setattr(engine, "config", config)
            assert (key(engine, settings()) == usual) == (field.name in batch.NOT_IN_KEY)
    assert [resumed(engine, folder, out) for _ in range(2)] == [set(), {"a.png", "b.png"}]
    assert resumed(engine, folder, out, alpha=0.25) == set()


def test_the_bundle_and_embeddings_of_every_set_of_prompts_decide(tmp_path):
    bundle, keys = Path(__file__).parents[1] / "bundles" / "v1" / "proposals.zsseg", []
    shutil.copytree(bundle, tmp_path / "edited")
    edit_manifest(tmp_path / "edited", ("head", "seen_bias"), 0.15)
    for path, change in ((bundle, 0.0), (bundle, 0.0), (bundle, 1.0), (tmp_path / "edited", 1.0)):
        with Engine(path, EngineConfig(device="cpu", use_cache=False)) as engine:
            embeds = np.ones((2, 3, engine.bundle.text.embed_dim), np.float32)
            embeds[1, 0, 0] += change
            engine.set_classes(["a", "b", "c"], embeddings=embeds)
            keys.append(batch.settings_key(engine, batch.PhotoSettings()))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("name", ["a.mask.png", "a.overlay.png"])
def test_a_photo_whose_pictures_are_not_whole_is_done_again(engine, folder, tmp_path, name):
    out = tmp_path / "out"
    resumed(engine, folder, out)
    whole = (out / name).read_bytes()
    for damaged in (None, b"", whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]):
        (out / name).unlink()
        if damaged is not None:
            (out / name).write_bytes(damaged)
        assert resumed(engine, folder, out) == {"b.png"}
        assert (out / name).read_bytes() == whole
        assert resumed(engine, folder, out) == {"a.png", "b.png"}
    write_photo(folder / "a.png", "green")  # another photo of the same name
    assert resumed(engine, folder, out) == {"b.png"}
    (entry,) = segment_photos(engine, [folder / "a.png"], out, resume=True)[0].classes
    assert entry["name"] == "green"


DAMAGE = {
    "bad UTF-8": lambda line: line[:-9] + b"\xc3",
    "cut": lambda line: line[: len(line) // 2],
    "a digit": lambda line: line.replace(b'"pixels": 768', b'"pixels": 769'),
    "null": lambda _: b"null",
    "a list": lambda _: b"[1, 2]",
    "empty object": lambda _: b"{}",
    "deep": lambda _: b"[" * 100000,
    "NUL": lambda _: bytes(50),
    "digits": lambda _: b"9" * 5000,
}


@pytest.mark.parametrize(
    ("name", "at_the_end"), [*((name, False) for name in DAMAGE), ("cut", True), ("NUL", True)]
)
def test_damaged_lines_are_skipped_and_told(engine, folder, tmp_path, name, at_the_end, caplog):
    out = tmp_path / "out"
    resumed(engine, folder, out)
    lines = (out / JOURNAL).read_bytes().splitlines()
    first, second = sorted(lines, key=lambda line: json.loads(line)["record"]["result"]["photo"])
    damaged = DAMAGE[name](second if at_the_end else first)
    lines = [first, damaged] if at_the_end else [damaged + b"\n" + second + b"\n"]
    (out / JOURNAL).write_bytes(b"\n".join(lines))
    assert resumed(engine, folder, out) == ({"a.png"} if at_the_end else {"b.png"})
    assert "damaged lines are skipped: 1" in caplog.text
    assert resumed(engine, folder, out) == {"a.png", "b.png"}  # nothing swallowed the new line


def test_names_that_are_not_utf8_are_resumed_and_shown_in_ascii(folder, colour_bundle, tmp_path):
    (folder / "a.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    out, report = tmp_path / "out", tmp_path / "r.json"
    call = ("-m", "zsseg_rt", "segment", folder, "-b", colour_bundle, "--class", "red", "-o", out)
    ascii_only = {"PYTHONIOENCODING": "ascii", "COLUMNS": "300"}
    for options in ((), ("--resume", "--json", report)):
        done = python(*call, *options, more_env=ascii_only)
        assert done.returncode == 0, done.stderr
        assert r"caf\udce9.png" in done.stdout
    (out / JOURNAL).read_text(encoding="utf-8")
    photos = json.loads(report.read_text(encoding="utf-8"))["photos"]
    assert [photo["resumed"] for photo in photos] == [True] * 2


def test_results_among_the_photos_are_not_photos_unless_they_are_named(
    folder, colour_bundle, caplog, capsys, monkeypatch
):
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # it would take caplog's handler
    names = []
    for _ in range(2):
        assert run("segment", folder, "-b", colour_bundle, "--class", "red", "-o", folder) == 0
        names.append(sorted(path.name for path in folder.iterdir()))
    assert names[0] == names[1]
    assert len(names[0]) == 2 + 4 + 1
    assert caplog.text.count("4 images *.overlay.png, *.overlay.jpg, *.mask.png") == 1
    named = folder / "a.overlay.png"
    assert find_photos([str(named)]) == [named]
    assert find_photos([str(folder / "*.png")]) == [folder / "a.png", folder / "b.png"]
    for photo in (folder / "a.png", folder / "b.png"):
        photo.unlink()
    assert run("segment", folder, "-b", "x.zsseg", "--class", "red") == 1
    assert "found only 4 results of an earlier run" in capsys.readouterr().err
