"""Checks of settings that many parts share, so that each has one wording."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from zsseg_rt.errors import ArgumentError, ShapeError


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        raise ArgumentError(
            f"{name}: expected one of {', '.join(choices)}, got {value!r}. Check the spelling."
        )


def check_size(size_hw: tuple[int, int], patch_size: int) -> None:
    """Refuse sizes that patches do not fill exactly."""
    if min(size_hw) < 1 or any(side % patch_size for side in size_hw):
        raise ShapeError(
            f"image_size: expected multiples of the patch size {patch_size}, got "
            f"{size_hw[0]}x{size_hw[1]}. Use the next multiple."
        )
