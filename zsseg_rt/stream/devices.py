"""The cameras of this machine, and whether they can be used; no picture is taken."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

DEV, SYSFS = Path("/dev"), Path("/sys/class/video4linux")

# <linux/videodev2.h>: what a device is, and its buffers, of which none are asked for.
_QUERYCAP, _CAPABILITY = 0x80685600, struct.Struct("16s 32s 32s I I I 3I")
_REQBUFS, _REQUESTBUFFERS = 0xC0145608, struct.Struct("5I")
_CAN_CAPTURE, _HAS_DEVICE_CAPS = 0x1, 0x80000000
_VIDEO_CAPTURE, _MEMORY_MMAP = 1, 1

_PROBLEMS = {
    errno.ENOENT: ("not in /dev", "In a container, pass it in: --device PATH."),
    errno.EACCES: ("forbidden", "sudo usermod -aG video $USER, then log in again."),
    errno.EPERM: ("forbidden", "sudo usermod -aG video $USER, then log in again."),
    errno.EBUSY: ("busy", "Close the program that uses it; fuser PATH names it."),
    errno.ENODEV: ("unplugged", "Plug it in again."),
    errno.ENXIO: ("unplugged", "Plug it in again."),
    errno.ENOTTY: ("no camera", ""),
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """A video device."""

    path: Path  # Its file, /dev/videoN
    name: str  # What its driver calls it; empty if that is unknown
    problem: str = ""  # What is wrong with it; empty if pictures can be had
    remedy: str = ""  # What to do about that; empty if nothing can be done


def find_devices(dev: Path = DEV, sysfs: Path = SYSFS) -> list[Device]:
    """Look for video devices, and open each for a moment."""
    files = {path.name for folder in (dev, sysfs) for path in folder.glob("video*")}
    names = sorted((n for n in files if re.fullmatch(r"video[0-9]+", n)), key=lambda n: int(n[5:]))
    return [_examine(dev / name, _name(sysfs / name)) for name in names]


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text(errors="replace").strip()
    except OSError:
        return ""


def _examine(path: Path, name: str) -> Device:
    try:
        problem, remedy = "", ""
        if not _gives_pictures(path):
            problem = "gives no pictures"
    except OSError as exc:
        problem, remedy = _PROBLEMS.get(exc.errno or 0, (exc.strerror or str(exc), ""))
    return Device(path=path, name=name, problem=problem, remedy=remedy.replace("PATH", str(path)))


def _gives_pictures(path: Path) -> bool:
    """Whether it is the device of a camera's pictures; many have another for metadata."""
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        answer = bytearray(_CAPABILITY.size)
        fcntl.ioctl(descriptor, _QUERYCAP, answer)
        *_, of_all, of_this, _, _, _ = _CAPABILITY.unpack(answer)
        if not (of_this if of_all & _HAS_DEVICE_CAPS else of_all) & _CAN_CAPTURE:
            return False
        none = bytearray(_REQUESTBUFFERS.pack(0, _VIDEO_CAPTURE, _MEMORY_MMAP, 0, 0))
        fcntl.ioctl(descriptor, _REQBUFS, none)  # refused while another program has buffers
        return True
    finally:
        os.close(descriptor)
