"""Cameras of this machine: their list, and V4L2 with a driver that misbehaves as it is told."""

import ctypes
import errno
import itertools
import json
import logging
import os
import shutil
import subprocess
import time
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest

from support import streams
from support.command_line import python
from support.required import without_streams
from support.streams import ReaderNow, number_of
from zsseg_rt import doctor
from zsseg_rt.doctor import Device, find_devices
from zsseg_rt.errors import SourceError
from zsseg_rt.stream.uris import open_sources

pytest.importorskip("av")

DRIVER = Path(streams.__file__).with_name("v4l2_driver.c")
OTHER = "test://?size=64x48&rate=50"
NAME = "/dev/video7"


@pytest.fixture(scope="module")
def with_camera(tmp_path_factory):
    """Runs a function of this file in a process whose camera is FFmpeg's V4L2 on a driver of ours.

    ``v4l2_driver.c`` says what the driver can be told; it works by LD_PRELOAD.
    """
    compiler, library = shutil.which("cc"), tmp_path_factory.mktemp("v4l2") / "v4l2_driver.so"
    if compiler is None:
        without_streams("no C compiler found (cc): apt install gcc")
    call = [compiler, "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", library, DRIVER, "-ldl"]
    subprocess.run(call, check=True, timeout=100)
    code = (
        "import json, sys, test_stream_v4l2 as tests\n"
        "function, arguments = json.loads(sys.argv[1])\n"
        "print(json.dumps(getattr(tests, function)(*arguments)))\n"
    )
    here = Path(__file__)
    folders = [here.parent, here.parents[1], os.environ.get("PYTHONPATH", "")]
    variables = {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(map(str, folders))}

    def run(function, *arguments):
        call = json.dumps([function.__name__, arguments])
        done = python("-c", code, call, timeout=100, more_env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def driver(name, kind=ctypes.c_int):
    """A variable of the driver in this process."""
    return kind.in_dll(ctypes.CDLL(None), f"driver_{name}")


def steer(**settings):
    for name, value in settings.items():
        driver(name).value = value


def read(cases, sysfs):
    """For each source and what its driver does: what reading it tells, and how it is listed."""
    rows, stamps = [], driver("stamps", ctypes.c_longlong * 4096)
    for uri, count, settings in cases:
        steer(**settings)
        pictures, frames, error = open_sources(uri)[0].pictures(ReaderNow()), [], None
        try:
            frames.extend(itertools.islice(pictures, count))
        except SourceError as exc:
            error = str(exc)
        pictures.close()
        numbers = [number_of(frame.image) for frame in frames]  # the device is closed
        (device,) = find_devices(sysfs=Path(sysfs))
        rows.append({
            "numbers": numbers,
            "stamps": [stamps[number] / 1e6 for number in numbers],
            "captured_at": [frame.captured_at for frame in frames],
            "clocks": sorted({frame.clock for frame in frames}),
            "shapes": sorted({frame.image.shape for frame in frames}),
            "ends": [error, driver("lent").value],  # of lent buffers the memory is gone
            "now": time.monotonic(),
            "listed": [str(device.path), device.name, device.problem, device.remedy],
        })  # fmt: skip
        steer(**dict.fromkeys(settings, 0))
    return rows


def lose_and_find(trouble, cure):
    """A stream of the camera and another source, while the camera is in trouble and after."""
    log = BufferingHandler(1000)
    logging.basicConfig(level=logging.INFO, handlers=[log])
    frames, lost, _ = streams.lose_and_find(
        [NAME, OTHER], lambda: steer(**trouble), lambda: steer(**cure),
        stalled_after=0.5, lost_after=1.5,
    )  # fmt: skip
    events = streams.events([record.getMessage() for record in log.buffer], NAME)
    return {"error": lost.error, "times": [f.captured_at for f in frames], "events": events}


@pytest.fixture
def sysfs(tmp_path):
    (tmp_path / "video7").mkdir()
    (tmp_path / "video7/name").write_text("Webcam\n")
    return str(tmp_path)


def test_pictures_have_the_driver_s_times_and_outlive_its_memory(with_camera, sysfs):
    small = f"v4l2://{NAME}?size=32x24&rate=100&format=yuyv422"
    cases = [("7", 20, {}), (NAME, 20, {"rgb": 1, "damaged": 3}), (small, 5, {"tells_date": 1})]
    plain, rgb, asked = with_camera(read, cases, sysfs)
    assert plain["numbers"] == list(range(20))
    assert plain["captured_at"] == pytest.approx(plain["stamps"], abs=2e-6, rel=0)
    assert plain["captured_at"][-1] < plain["now"]
    assert plain["clocks"] == ["driver"]
    assert plain["shapes"] == [[48, 64, 3]]
    assert rgb["numbers"] == [(23 + n) % 28 for n in range(20)]  # three damaged ones are left out
    assert asked["shapes"] == [[24, 32, 3]]
    assert len(asked["numbers"]) == 5
    assert asked["clocks"] == ["arrival"]  # times of the day are not ours
    assert all(at < asked["now"] for at in asked["captured_at"])
    assert plain["ends"] == rgb["ends"] == asked["ends"] == [None, 0]


TROUBLES = [
    # What the driver does, the source, what reading it tells; what the list says, and advises.
    ({}, f"v4l2://{NAME}?format=mjpeg", "It has no such format", "", ""),
    ({"open_error": errno.ENOENT}, NAME, "No such file or directory. Plug", "not in /dev",
     "--device /dev/video7"),
    ({"open_error": errno.EACCES}, NAME, "Permission denied. Allow it: sudo usermod", "forbidden",
     "usermod -aG video"),
    ({"format_error": errno.EBUSY}, NAME, "busy. Close the program that uses it", "busy",
     "fuser /dev/video7 names it"),
    ({"open_error": errno.ENODEV}, NAME, "No such device. Plug", "unplugged", "Plug it in again"),
    ({"open_error": errno.EIO}, NAME, "Check its cable", "Input/output error", ""),
    ({"no_camera": 1}, NAME, "It is not a camera", "no camera", ""),
    ({"no_camera": 2}, NAME, "No such device. Plug", "gives no pictures", ""),
    ({"read_error": errno.ENOSPC}, NAME, "Too many cameras share a USB bus", "", ""),
    ({"read_error": errno.EIO}, NAME, "Check its cable", "", ""),
]  # fmt: skip


def test_what_is_wrong_with_a_device_is_told_with_its_remedy(with_camera, sysfs):
    cases = [(uri, 5, settings) for settings, uri, *_ in TROUBLES]
    rows = with_camera(read, cases, sysfs)
    for row, trouble in zip(rows, TROUBLES, strict=True):
        (_, uri, reason, problem, remedy), (*listed, advice) = trouble, row["listed"]
        error, lent_then = row["ends"]
        assert (row["numbers"], lent_then) == ([], 0), trouble
        assert error.startswith(f"{uri}: cannot be read: "), trouble
        assert reason in error
        assert listed == ["/dev/video7", "Webcam", problem], trouble
        assert (remedy in advice, bool(remedy)) == (True, bool(advice)), trouble


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"read_error": errno.ENODEV, "open_error": errno.ENOENT}, "Plug the camera in"),
        # The thread that hangs in the driver stays there; the process must end all the same.
        ({"is_stuck": 1}, "none came for"),
    ],
)
def test_a_camera_that_is_lost_comes_back_and_others_go_on_meanwhile(with_camera, trouble, reason):
    cure = dict.fromkeys(trouble, 0)
    facts = with_camera(lose_and_find, trouble, cure)
    assert reason in facts["error"]
    states = [event for event in facts["events"] if event != "stalled"]
    assert states == ["running", "lost", "running again"]
    assert facts["times"] == sorted(set(facts["times"]))  # nothing is repeated


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
    devices = find_devices(dev, sysfs)
    assert [(d.path.name, d.name, d.problem) for d in devices] == [
        ("video0", "Webcam: C920", "not in /dev"),
        ("video2", "", "no camera"),  # they are files
        ("video10", "Webcam: C920", "no camera"),
    ]
    assert f"--device {devices[0].path}" in devices[0].remedy


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
    (line,) = (one for one in doctor.examine() if one.topic == "cameras")
    assert (line.status, line.detail) == (status, detail)
    assert remedy in line.remedy
