"""Photos that are labelled at the same time give what they give one by one."""

import threading

import cv2
import numpy as np
import pytest

from support.command_line import run
from support.errors import refused
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, EngineStateError, SourceError
from zsseg_rt.integrations import batch
from zsseg_rt.integrations.batch import JOURNAL, Budget, lanes_for, segment_photos
from zsseg_rt.photos import find_photos
from zsseg_rt.runtime.lane_pool import LanePool, in_order

NAMES = ["red", "blue", "green", "white"]
LIMIT = 30.0  # seconds


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for index in range(12):
        picture = np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((8, 8 + index, 1)))
        path = tmp_path / "in" / f"{index:02}.png"
        path.write_bytes(cv2.imencode(".png", picture.astype(np.uint8))[1].tobytes())
    (tmp_path / "in" / "05.png").write_bytes(b"none")
    return tmp_path / "in"


@pytest.fixture
def engine_with(colour_bundle):
    engines = []

    def open_engine(num_lanes, **settings):
        config = EngineConfig(use_cache=False, num_lanes=num_lanes, **settings)
        engine = Engine(colour_bundle, config)
        engine.set_classes(NAMES)
        engines.append(engine)
        return engine

    yield open_engine
    for engine in engines:
        engine.close()


def images_in(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != JOURNAL}


def test_lanes_change_nothing(engine_with, folder, tmp_path):
    photos, outcomes = find_photos([str(folder)]), []
    for lanes in (1, 3):
        out = tmp_path / f"out {lanes}"
        seen = []
        results = segment_photos(
            engine_with(lanes), photos, out, on_done=lambda *done, seen=seen: seen.append(done[0])
        )
        assert seen == results
        assert [result.photo for result in results] == [str(photo) for photo in photos]
        assert [bool(result.error) for result in results] == [i == 5 for i in range(12)]
        outcomes.append(([result.classes for result in results], images_in(out)))
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][1]) == 22


def test_the_engine_s_channel_order_changes_nothing(engine_with, folder, tmp_path):
    photos, outcomes = find_photos([str(folder)])[:3], []
    for order in ("rgb", "bgr"):
        out = tmp_path / order
        results = segment_photos(engine_with(1, channel_order=order), photos, out)
        outcomes.append(([result.classes for result in results], images_in(out)))
    assert outcomes[0] == outcomes[1]


def test_what_lanes_have_done_is_resumed(engine_with, folder, tmp_path):
    photos = find_photos([str(folder)])
    segment_photos(engine_with(3), photos, tmp_path / "out")
    again = segment_photos(engine_with(1), photos, tmp_path / "out", resume=True)
    assert [result.resumed for result in again] == [i != 5 for i in range(12)]


def test_lanes_are_closed_at_the_end(engine_with, folder, tmp_path):
    engine, photos = engine_with(2), find_photos([str(folder)])
    for _ in range(3):
        segment_photos(engine, photos, tmp_path / "out")
    with engine.lane(), refused(EngineStateError, "lanes"):
        segment_photos(engine, photos, tmp_path / "out")


def test_all_lanes_are_used(engine_with, folder, tmp_path, monkeypatch):
    engine = engine_with(2)
    meeting = threading.Barrier(2, timeout=LIMIT)  # fails if photos are labelled one by one
    label = LanePool.segment

    def together(lanes, frame):
        meeting.wait()
        return label(lanes, frame)

    monkeypatch.setattr(LanePool, "segment", together)
    (folder / "05.png").unlink()
    (folder / "11.png").unlink()
    results = segment_photos(engine, find_photos([str(folder)]), tmp_path / "out")
    assert [result.error for result in results] == [None] * 10


def test_a_missing_package_ends_the_run(engine_with, folder, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise BackendUnavailableError("cv2: expected OpenCV")

    monkeypatch.setattr(batch, "decode_photo", missing)
    with refused(BackendUnavailableError, "cv2"):
        segment_photos(engine_with(2), find_photos([str(folder)]), tmp_path / "out")


def test_an_error_of_the_engine_names_its_photo(engine_with, folder, tmp_path, monkeypatch):
    def too_thin(*_, **__):
        raise ArgumentError("frame: expected a larger one")

    monkeypatch.setattr(LanePool, "segment", too_thin)
    photos = find_photos([str(folder)])
    results = segment_photos(engine_with(2), photos, tmp_path / "out")
    for photo, result in zip(photos, results, strict=True):
        assert result.error.startswith(f"{photo}: ")
        assert result.error.count(str(photo)) == 1


def test_an_interrupted_run_begins_no_further_photo(engine_with, folder, tmp_path):
    out = tmp_path / "out"

    def interrupt(result, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_photos(engine_with(2), find_photos([str(folder)]), out, on_done=interrupt)
    done = len(images_in(out)) // 2
    assert 1 <= done <= 9  # the first, and those under way or waiting for their turn
    assert len((out / JOURNAL).read_bytes().splitlines()) == done


def test_lanes_of_the_command(colour_bundle, folder, tmp_path, capsys):
    arguments = ("segment", folder, "-b", colour_bundle, "--class", "red")
    for lanes in (0, 1, 3):
        out = tmp_path / f"out {lanes}"
        assert run(*arguments, "-o", out, "--lanes", lanes) == 1
        assert "1 of 12 photos failed" in capsys.readouterr().err
    assert images_in(tmp_path / "out 0") == images_in(tmp_path / "out 3")
    assert run(*arguments, "-o", out, "--lanes", 65) == 2


@pytest.mark.parametrize(
    ("photos", "config", "lanes"),
    [
        (1, {}, 1),
        (0, {}, 1),
        (100, {"num_threads": 2}, 2),
        (100, {"num_threads": 64}, 4),
        (3, {"num_threads": 64}, 3),
        (100, {"backend": "torch", "num_threads": 64}, 1),
    ],
)
def test_lanes_for(photos, config, lanes):
    assert lanes_for(photos, EngineConfig(device="cpu", **config)) == lanes


def test_overlays_as_jpeg(colour_bundle, folder, tmp_path, capsys):
    arguments = ("segment", folder / "03.png", "-b", colour_bundle, "--classes", "red,blue")
    pictures = []
    for kind in ("png", "jpg"):
        out = tmp_path / kind
        assert run(*arguments, "-o", out, "--overlay-format", kind) == 0
        assert sorted(images_in(out)) == ["03.mask.png", f"03.overlay.{kind}"]
        pictures.append(cv2.imread(str(out / f"03.overlay.{kind}")).astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 8
    assert run(*arguments, "-o", tmp_path / "png", "--overlay-format", "jpg", "--resume") == 0
    assert (tmp_path / "png" / "03.overlay.jpg").exists()
    assert run(*arguments, "--overlay-format", "gif") == 2
    with refused(SourceError, None, "2"):
        find_photos([str(tmp_path / "jpg")])


# --- the parts ---


def test_results_are_in_order_and_few_are_ahead():
    begun, lock = [], threading.Lock()

    def work(job):
        with lock:
            begun.append(job)
        return job * job

    results = in_order(work, range(100), num_threads=3)
    for expected in range(10):
        assert next(results) == expected**2
        assert len(begun) <= expected + 1 + 4
    results.close()
    assert len(begun) <= 14


def test_a_failure_is_raised_in_its_turn():
    def work(job):
        if job == 2:
            raise KeyError(job)
        return job

    results = in_order(work, range(9), num_threads=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)


def test_a_budget_is_never_exceeded():
    budget, lock, held, most = Budget(10), threading.Lock(), [0], [0]

    def work(amount):
        for _ in range(200):
            with budget.taken(amount):
                with lock:
                    held[0] += min(amount, 10)
                    most[0] = max(most[0], held[0])
                with lock:
                    held[0] -= min(amount, 10)

    threads = [threading.Thread(target=work, args=(a,)) for a in (1, 3, 4, 7, 10, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    assert most[0] <= 10
    assert held == [0]
