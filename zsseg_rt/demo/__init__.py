"""Content of ``--demo``: small bundles, images, a clip, class names; they ship with the package.

docs/scenes.md describes them; NOTICE says where their files come from.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from zsseg_rt.errors import ArgumentError, BundleError

__all__ = ["DEFAULT", "DEMOS", "demo_bundle", "demo_classes", "demo_clip", "demo_photos"]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Files of one demo, in this folder."""

    bundle: str
    classes: str
    photos: tuple[str, ...]
    clip: str = ""


DEMOS = {
    "scenes": Demo(
        bundle="scenes.zsseg",
        classes="classes.txt",
        photos=("playroom.png", "beach.png", "hall.png", "terrace.png"),
    ),
    "photos": Demo(
        bundle="photos.zsseg",
        classes="photos.txt",
        photos=("dining_room.jpg", "pickup.jpg", "bird.jpg", "dog_walk.jpg"),
        clip="dog_walk.zip",
    ),
}
DEFAULT = "photos"


def demo_bundle(name: str = DEFAULT) -> Path:
    """The bundle's folder."""
    return _shipped(_demo(name).bundle)


def demo_photos(name: str = DEFAULT) -> list[str]:
    """Paths of the images."""
    return [str(_shipped(photo)) for photo in _demo(name).photos]


def demo_classes(name: str = DEFAULT) -> list[str]:
    """Names of classes to look for; of ``"scenes"``, some are names that training never saw."""
    return _shipped(_demo(name).classes).read_text(encoding="utf-8").splitlines()


def demo_clip(name: str = DEFAULT) -> list[bytes]:
    """Frames of a video, as JPEG, ten per second; none where the demo has no video."""
    if not (clip := _demo(name).clip):
        return []
    with zipfile.ZipFile(_shipped(clip)) as archive:
        return [archive.read(frame) for frame in sorted(archive.namelist())]


def _demo(name: str) -> Demo:
    if name not in DEMOS:
        raise ArgumentError(f"name: expected one of {', '.join(DEMOS)}, got {name!r}")
    return DEMOS[name]


def _shipped(name: str) -> Path:
    path = Path(__file__).parent / name
    if not path.exists():
        raise BundleError(
            f"{path}: expected to ship with the package, got nothing. Install it again, or make "
            "it with tools/make_demo.py."
        )
    return path
