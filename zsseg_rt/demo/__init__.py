"""What ``--demo`` shows: a small bundle, four images and class names that ship with the package.

The bundle was trained on a synthetic world of things and stuff; see docs/training.md.
"""

from __future__ import annotations

from pathlib import Path

from zsseg_rt.errors import BundleError

__all__ = ["BUNDLE", "CLASSES", "PHOTOS", "demo_bundle", "demo_classes", "demo_photos"]

BUNDLE = "scenes.zsseg"
CLASSES = "classes.txt"
PHOTOS = ("playroom.png", "beach.png", "hall.png", "terrace.png")


def demo_bundle() -> Path:
    """The bundle's folder."""
    return _shipped(BUNDLE)


def demo_photos() -> list[str]:
    """Paths of the images."""
    return [str(_shipped(name)) for name in PHOTOS]


def demo_classes() -> list[str]:
    """Names of classes to look for, some of which the bundle's training never saw."""
    return _shipped(CLASSES).read_text(encoding="utf-8").splitlines()


def _shipped(name: str) -> Path:
    path = Path(__file__).parent / name
    if not path.exists():
        raise BundleError(
            f"{path}: expected to ship with the package, got nothing. Install it again, or make "
            "it with tools/make_demo.py."
        )
    return path
