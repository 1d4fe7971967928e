"""Frames as cameras and video decoders deliver them: NV12, in two planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zsseg_rt.common.arrays import Array
from zsseg_rt.errors import FrameError
from zsseg_rt.runtime.inputs.checks import MOST_SIDE, check_place, described

_MATRICES = ("bt601", "bt709", "bt601-full", "bt709-full")


@dataclass(frozen=True, eq=False)
class Nv12Frame:
    """A frame in two planes.

    A plane's rows may lie further apart than they are long, as decoders leave them.

    Attributes:
        luma: uint8 [H, W], brightness; H and W are even.
        chroma: uint8 [H / 2, W / 2, 2], U then V of every two by two pixels.
        colour_matrix: ``"bt601"`` (most cameras) or ``"bt709"`` (most HD video): how the planes
            become RGB. Brightness is from 16 to 235 and colour from 16 to 240, or both from 0 to
            255 with ``"bt601-full"`` and ``"bt709-full"``.

    Example:
        >>> planes = np.full((4, 6), 235, np.uint8), np.full((2, 3, 2), 128, np.uint8)
        >>> Nv12Frame(*planes, colour_matrix="bt709").shape
        (4, 6, 3)
    """

    luma: Array
    chroma: Array
    colour_matrix: str = "bt601"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the RGB frame that the planes stand for."""
        height, width = self.luma.shape
        return int(height), int(width), 3


def as_nv12(frame: Any) -> Nv12Frame | None:
    """The frame in planes, of which a plain tuple may be given; None for any other frame."""
    if isinstance(frame, Nv12Frame):
        return frame
    if not isinstance(frame, tuple) or (frame and getattr(frame[0], "ndim", 2) == 3):
        return None  # no frame, or several of them
    if len(frame) != 2:
        raise FrameError(
            f"frame: expected an array or two planes, got {len(frame)} planes. NV12 has brightness "
            "and colour."
        )
    return Nv12Frame(*frame)


def check_nv12(frame: Nv12Frame, device: str) -> None:
    """Refuse planes that are no NV12 frame, as far as they tell by themselves."""
    if frame.colour_matrix not in _MATRICES:
        raise FrameError(
            f"colour_matrix: expected one of {', '.join(_MATRICES)}, got {frame.colour_matrix!r}"
        )
    for name, plane in (("luma", frame.luma), ("chroma", frame.chroma)):
        if device == "cpu":
            _check_host(name, plane)
        else:
            check_place(name, plane, device)
        dtype = str(getattr(plane, "dtype", "uint8")).removeprefix("torch.")
        if dtype != "uint8":
            raise FrameError(f"{name}: expected uint8, got {dtype}. Convert it first.")
    _check_sizes(_shape_of("luma", frame.luma), _shape_of("chroma", frame.chroma))


def _check_host(name: str, plane: Any) -> None:
    if not isinstance(plane, np.ndarray) or isinstance(plane, np.ma.MaskedArray):
        raise FrameError(
            f"{name}: expected a plain NumPy array, got {described(plane)}. For planes on a GPU "
            "use segment_device."
        )


def _shape_of(name: str, plane: Any) -> tuple[int, ...]:
    shape = getattr(plane, "shape", None)
    if shape is None:
        raise FrameError(f"{name}: expected an array with a shape, got {type(plane).__name__}.")
    return tuple(shape)


def _check_sizes(luma: tuple[int, ...], chroma: tuple[int, ...]) -> None:
    if len(luma) != 2 or not all(1 <= side <= MOST_SIDE for side in luma):
        raise FrameError(f"luma: expected shape [H, W] with sides from 1 to 32767, got {luma}.")
    if luma[0] % 2 or luma[1] % 2:
        raise FrameError(
            f"luma: expected even sides, got {luma}. NV12 has one colour for two by two pixels."
        )
    wanted = (luma[0] // 2, luma[1] // 2, 2)
    if chroma != wanted:
        raise FrameError(
            f"chroma: expected shape {wanted}, got {chroma}. Give U and V in the last axis, as in "
            "plane.reshape(H // 2, W // 2, 2)."
        )
