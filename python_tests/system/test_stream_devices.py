"""The cameras of a machine: those of a folder that stands for it, and one with a driver."""

import errno
from pathlib import Path

import pytest

from support.v4l2_camera import run_with_camera, steer
from zsseg_rt import doctor
from zsseg_rt.stream.devices import Device, find_devices


@pytest.fixture
def machine(tmp_path):
    """Empty folders that stand for /dev and /sys/class/video4linux."""
    folders = tmp_path / "dev", tmp_path / "sys"
    for folder in folders:
        folder.mkdir()
    return folders


def add(machine, number, *, name=None, has_file=True):
    dev, sysfs = machine
    if has_file:
        (dev / f"video{number}").write_bytes(b"")
    if name is not None:
        (sysfs / f"video{number}").mkdir()
        (sysfs / f"video{number}" / "name").write_text(f"{name}\n")


def test_a_machine_without_cameras_has_none(machine, tmp_path):
    assert find_devices(*machine) == []
    assert find_devices(tmp_path / "absent", tmp_path / "absent") == []


def test_devices_come_in_the_order_of_their_numbers_with_their_names(machine):
    add(machine, 10, name="Webcam: C920")
    add(machine, 2)
    (machine[0] / "videos").mkdir()
    found = find_devices(*machine)
    assert [(d.path.name, d.name) for d in found] == [("video2", ""), ("video10", "Webcam: C920")]
    assert {d.problem for d in found} == {"no camera"}  # they are files


def test_a_device_that_is_not_passed_into_a_container_is_told(machine):
    add(machine, 0, name="Webcam", has_file=False)
    (found,) = find_devices(*machine)
    assert found.problem == "not in /dev"
    assert f"--device {found.path}" in found.remedy


def look(name, settings):
    """What is found of the driver's camera, in the process that has it."""
    steer(**settings)
    sysfs = Path(name)
    (found,) = find_devices(sysfs=sysfs)
    return [str(found.path), found.name, found.problem, found.remedy]


@pytest.mark.parametrize(
    ("settings", "problem", "told"),
    [
        ({}, "", ""),
        ({"open_error": errno.EACCES}, "forbidden", "usermod -aG video"),
        ({"format_error": errno.EBUSY}, "busy", "fuser /dev/video7 names it"),
        ({"open_error": errno.ENODEV}, "unplugged", "Plug it in again"),
        ({"no_camera": 1}, "no camera", ""),
        ({"no_camera": 2}, "gives no pictures", ""),
        ({"open_error": errno.EIO}, "Input/output error", ""),
    ],
)
def test_what_is_wrong_with_a_camera_is_told(v4l2_driver, machine, settings, problem, told):
    add(machine, 7, name="Webcam", has_file=False)
    found = run_with_camera(v4l2_driver, look, str(machine[1]), settings)
    assert found[:3] == ["/dev/video7", "Webcam", problem]
    assert told in found[3]
    assert bool(found[3]) == bool(told)


WELL = Device(path=Path("/dev/video0"), name="Webcam")
BUSY = Device(path=Path("/dev/video2"), name="", problem="busy", remedy="Close it.")


@pytest.mark.parametrize(
    ("devices", "status", "detail", "remedy"),
    [
        (
            [],
            "absent",
            "no /dev/videoN found",
            "To use one here, plug it in; in a container, pass it in: --device /dev/video0.",
        ),
        ([WELL], "ok", "/dev/video0 Webcam", ""),
        ([BUSY], "absent", "/dev/video2 (busy)", "/dev/video2: Close it."),
        ([WELL, BUSY], "ok", "/dev/video0 Webcam; /dev/video2 (busy)", "/dev/video2: Close it."),
    ],
)
def test_the_doctor_lists_cameras(monkeypatch, devices, status, detail, remedy):
    monkeypatch.setattr(doctor, "find_devices", lambda: devices)
    found = doctor._cameras()
    assert found.topic == "cameras"
    assert (found.status, found.detail, found.remedy) == (status, detail, remedy)
