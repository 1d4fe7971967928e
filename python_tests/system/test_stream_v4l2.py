"""Cameras of this machine: their list, and V4L2 with a driver that misbehaves as it is told."""

import errno
import itertools
import logging
import time
from pathlib import Path

import pytest

from support.streams import ReaderNow, follow, label, number_of
from support.v4l2_camera import lent, run_with_camera, stamp, steer
from zsseg_rt import doctor
from zsseg_rt.errors import SourceError
from zsseg_rt.stream.devices import Device, find_devices
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.watch import Patience

pytest.importorskip("av")


OTHER = "test://?size=64x48&rate=50"
NAME = "/dev/video7"


# ---- what runs in the process that has the camera


def read(uri, count, settings):
    """So many pictures; the driver is told something before the first."""
    steer(**settings)
    (source,) = open_sources(uri)
    reader, error = ReaderNow(), None
    pictures = source.pictures(reader)
    found = []
    try:
        found.extend(itertools.islice(pictures, count))
    except SourceError as exc:
        error = str(exc)
    pictures.close()
    numbers = [number_of(picture.image) for picture in found]  # the device is closed
    return {
        "numbers": numbers,
        "stamps": [stamp(number) for number in numbers],
        "captured_at": [picture.captured_at for picture in found],
        "clocks": sorted({picture.clock for picture in found}),
        "shapes": sorted({picture.image.shape for picture in found}),
        "error": error,
        "lent": lent(),
        "now": time.monotonic(),
    }


def read_all(cases):
    """The same for several addresses, each with what its driver does."""
    found = []
    for uri, settings in cases:
        found.append(read(uri, 5, settings))
        steer(**dict.fromkeys(settings, 0))
    return found


class Lines(logging.Handler):
    """What was logged."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append(record.getMessage())


def lose_and_find(trouble, cure):
    """A stream of the camera and another source, while the camera is in trouble and after."""
    lines = Lines()
    logger = logging.getLogger("zsseg_rt")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    patience = Patience(stalled_after=0.5, lost_after=1.5, first_retry=0.1, longest_retry=0.2)
    with Stream(open_sources([NAME, OTHER]), label, patience=patience) as stream:
        frames = follow(stream, lambda: stream.stats()[NAME].labelled >= 3)
        steer(**trouble)
        frames += follow(stream, lambda: stream.stats()[NAME].state == "lost")
        others = stream.stats()[OTHER].labelled
        frames += follow(stream, lambda: stream.stats()[OTHER].labelled >= others + 50)
        lost = stream.stats()[NAME]
        steer(**cure)
        frames += follow(stream, lambda: stream.stats()[NAME].reconnects == 1)
        frames += follow(stream, lambda: stream.stats()[NAME].state == "running")[:1]
        frames.append(next(stream).frame)
        states = {name: stats.state for name, stats in stream.stats().items()}
    mine = [frame for frame in frames if frame.source == NAME]
    return {
        "error": lost.error,
        "states": states,
        "times": [frame.captured_at for frame in mine],
        "indices": [frame.index for frame in mine],
        "dropped_before": [frame.dropped_before for frame in mine],
        "lines": [line.removeprefix(f"{NAME}: ") for line in lines.found if NAME in line],
    }


# ---- the tests


def test_a_camera_s_pictures_have_the_driver_s_times(v4l2_driver):
    found = run_with_camera(v4l2_driver, read, "7", 20, {})
    assert found["numbers"] == list(range(20))
    assert found["captured_at"] == pytest.approx(found["stamps"], abs=2e-6, rel=0)
    assert found["captured_at"][-1] < found["now"]
    assert found["clocks"] == ["driver"]
    assert found["shapes"] == [[48, 64, 3]]
    assert (found["error"], found["lent"]) == (None, 0)


def test_a_size_and_a_rate_may_be_asked_for_and_times_of_the_day_are_not_taken(v4l2_driver):
    uri = f"v4l2://{NAME}?size=32x24&rate=100&format=yuyv422"
    found = run_with_camera(v4l2_driver, read, uri, 5, {"tells_date": 1})
    assert found["shapes"] == [[24, 32, 3]]
    assert found["numbers"] == list(range(5))
    assert found["clocks"] == ["arrival"]
    assert all(at < found["now"] for at in found["captured_at"])


def test_pictures_outlive_the_driver_s_memory_without_damaged_ones(v4l2_driver):
    found = run_with_camera(v4l2_driver, read, NAME, 20, {"rgb": 1, "damaged": 3})
    assert found["numbers"] == list(range(3, 23))
    assert (found["error"], found["lent"]) == (None, 0)


REFUSALS = [
    ("No such file or directory. Plug", NAME, {"open_error": errno.ENOENT}),
    ("Permission denied. Allow it: sudo usermod", NAME, {"open_error": errno.EACCES}),
    ("busy. Close the program that uses it", NAME, {"format_error": errno.EBUSY}),
    ("Too many cameras share a USB bus", NAME, {"read_error": errno.ENOSPC}),
    ("No such device. Plug", NAME, {"read_error": errno.ENODEV}),
    ("Check its cable", NAME, {"read_error": errno.EIO}),
    ("It is not a camera", NAME, {"no_camera": 1}),
    ("No such device. Plug", NAME, {"no_camera": 2}),
    ("It has no such format", f"v4l2://{NAME}?format=mjpeg", {}),
]


@pytest.fixture(scope="module")
def refused(v4l2_driver):
    return run_with_camera(v4l2_driver, read_all, [case[1:] for case in REFUSALS])


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_what_is_wrong_with_a_device_is_told_with_its_remedy(refused, case):
    told, uri, _ = REFUSALS[case]
    assert refused[case]["numbers"] == []
    assert refused[case]["error"].startswith(f"{uri}: cannot be read: ")
    assert told in refused[case]["error"]
    assert refused[case]["lent"] == 0


def events(lines):
    """The first word or two of each line of the log; it may stall while the machine is busy."""
    found = [line.split(":")[0] for line in lines]
    return [event for event in found if event != "stalled"]


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ({"read_error": errno.ENODEV, "open_error": errno.ENOENT}, "Plug the camera in"),
        # The thread that hangs in the driver stays there; the process must end all the same.
        ({"is_stuck": 1}, "none came for"),
    ],
)
def test_a_camera_that_is_lost_comes_back_and_others_go_on_meanwhile(v4l2_driver, trouble, told):
    cure = dict.fromkeys(trouble, 0)
    found = run_with_camera(v4l2_driver, lose_and_find, trouble, cure)
    assert told in found["error"]
    assert events(found["lines"]) == ["running", "lost", "running again"]
    assert set(found["states"].values()) == {"running"}
    # Nothing is repeated, and every index is there or counted as dropped.
    assert found["times"] == sorted(set(found["times"]))
    indices, dropped = found["indices"], found["dropped_before"]
    assert all(
        newer == older + 1 + count
        for older, newer, count in zip(indices, indices[1:], dropped[1:], strict=False)
    )


def test_devices_come_in_the_order_of_their_numbers_with_their_names(tmp_path):
    """Folders stand for /dev and /sys/class/video4linux."""
    dev, sysfs = tmp_path / "dev", tmp_path / "sys"
    assert find_devices(dev, sysfs) == []
    for name in ("video10", "video0"):
        (sysfs / name).mkdir(parents=True)
        (sysfs / name / "name").write_text("Webcam: C920\n")
    (dev / "videos").mkdir(parents=True)
    for name in ("video10", "video2"):
        (dev / name).write_bytes(b"")
    found = find_devices(dev, sysfs)
    assert [(d.path.name, d.name, d.problem) for d in found] == [
        ("video0", "Webcam: C920", "not in /dev"),
        ("video2", "", "no camera"),  # they are files
        ("video10", "Webcam: C920", "no camera"),
    ]
    assert f"--device {found[0].path}" in found[0].remedy


def look(name, cases):
    """What is found of the driver's camera, in the process that has it."""
    devices = []
    for settings in cases:
        steer(**settings)
        devices += find_devices(sysfs=Path(name))
        steer(**dict.fromkeys(settings, 0))
    return [[str(one.path), one.name, one.problem, one.remedy] for one in devices]


PROBLEMS = [
    ({}, "", ""),
    ({"open_error": errno.EACCES}, "forbidden", "usermod -aG video"),
    ({"format_error": errno.EBUSY}, "busy", "fuser /dev/video7 names it"),
    ({"open_error": errno.ENODEV}, "unplugged", "Plug it in again"),
    ({"no_camera": 1}, "no camera", ""),
    ({"no_camera": 2}, "gives no pictures", ""),
    ({"open_error": errno.EIO}, "Input/output error", ""),
]


def test_what_is_wrong_with_a_camera_is_told(v4l2_driver, tmp_path):
    (tmp_path / "video7").mkdir()
    (tmp_path / "video7/name").write_text("Webcam\n")
    cases = [settings for settings, *_ in PROBLEMS]
    found = run_with_camera(v4l2_driver, look, str(tmp_path), cases)
    for (path, name, problem, remedy), (_, expected, told) in zip(found, PROBLEMS, strict=True):
        assert (path, name, problem) == ("/dev/video7", "Webcam", expected)
        assert told in remedy
        assert bool(remedy) == bool(told)


WELL = Device(path=Path("/dev/video0"), name="Webcam")
BUSY = Device(path=Path("/dev/video2"), name="", problem="busy", remedy="Close it.")


@pytest.mark.parametrize(
    ("devices", "status", "detail", "remedy"),
    [
        ([], "absent", "no /dev/videoN found", "in a container, pass it in"),
        ([BUSY], "absent", "/dev/video2 (busy)", "/dev/video2: Close it."),
        ([WELL, BUSY], "ok", "/dev/video0 Webcam; /dev/video2 (busy)", "/dev/video2: Close it."),
    ],
)
def test_the_doctor_lists_cameras(monkeypatch, devices, status, detail, remedy):
    monkeypatch.setattr(doctor, "find_devices", lambda: devices)
    (found,) = (one for one in doctor.examine() if one.topic == "cameras")
    assert (found.status, found.detail) == (status, detail)
    assert remedy in found.remedy
