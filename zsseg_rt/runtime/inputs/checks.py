"""Tell what is wrong with a frame, and the call that mends it."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np

from zsseg_rt.errors import FrameError

_CUDA_KINDS = (2, 13)  # DLPack's numbers of CUDA memory and managed memory
MOST_SIDE = 32767
"""Pixels that a side of what kernels take may have."""
_EXPECTED = "a uint8 NumPy array [H, W, 3]"


def check_frame(frame: Any) -> None:
    """Refuse what is no uint8 array [H, W, 3] in C order; nothing is converted in silence."""
    if not isinstance(frame, np.ndarray):
        raise FrameError(
            f"frame: expected {_EXPECTED}, got {described(frame)}. {_conversion(frame)}"
        )
    if isinstance(frame, np.ma.MaskedArray):
        raise FrameError("frame: expected a plain array, got a masked one. Use .filled(0).")
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise FrameError(
            f"frame: expected shape [H, W, 3], got {frame.shape}.{_reshaping(frame.shape)}"
        )
    _check_sides(frame.shape)
    if frame.dtype != np.uint8:
        raise FrameError(f"frame: expected uint8, got {frame.dtype}. {_scaling(frame)}")
    if not frame.flags.c_contiguous:
        raise FrameError(
            f"frame: expected a C-contiguous array, got strides {frame.strides} of a view. "
            "Use np.ascontiguousarray(frame), which copies it."
        )


def check_device_frame(frame: Any, device: str) -> None:
    """Refuse what is no uint8 array [H, W, 3] on a GPU, as far as the array tells by itself."""
    check_place("frame", frame, device)
    shape = getattr(frame, "shape", None)
    if shape is None or len(shape) != 3 or shape[2] != 3:
        found = "an array without a shape" if shape is None else tuple(shape)
        raise FrameError(f"frame: expected shape [H, W, 3], got {found}.")
    _check_sides(shape)
    dtype = str(getattr(frame, "dtype", "uint8")).removeprefix("torch.")
    if dtype != "uint8":
        raise FrameError(f"frame: expected uint8, got {dtype}. Convert it on the GPU first.")


def check_place(name: str, array: Any, device: str) -> None:
    """Refuse what does not lie on a GPU, as far as it tells by itself."""
    tell = getattr(array, "__dlpack_device__", None)
    place = None if tell is None else tell()
    on_gpu = place is not None and place[0] in _CUDA_KINDS
    if isinstance(array, np.ndarray) or not (on_gpu or hasattr(array, "__cuda_array_interface__")):
        raise FrameError(
            f"{name}: expected an array on {device} with __dlpack__ or __cuda_array_interface__, "
            f"got {described(array)} in host memory. Use segment(frame)."
        )
    if place is not None and place[1] != int(device.partition(":")[2]):
        raise FrameError(
            f"{name}: expected an array on {device}, got one on cuda:{place[1]}. Copy it there, "
            "or use an engine on its GPU."
        )


def _check_sides(shape: tuple[int, ...]) -> None:
    if not all(1 <= side <= MOST_SIDE for side in shape[:2]):
        raise FrameError(
            f"frame: expected sides from 1 to {MOST_SIDE}, got {tuple(shape)}. Check that the "
            "frame was read."
        )


def described(frame: Any) -> str:
    """A frame's type in words."""
    if frame is None:
        return "NoneType"
    if isinstance(frame, (str, PathLike)):
        return f"the path {str(frame)!r}"
    if isinstance(frame, (list, tuple)):
        return f"a {type(frame).__name__} of {len(frame)}"
    kind = type(frame)
    return f"{kind.__module__}.{kind.__qualname__}"


def _conversion(frame: Any) -> str:
    """The call that makes a frame of what is no NumPy array."""
    home = type(frame).__module__.partition(".")[0]
    if frame is None:
        return (
            "cv2.imread and VideoCapture.read give None for what they cannot read: check the path "
            "or the camera."
        )
    if isinstance(frame, (str, PathLike)):
        return "Use zsseg_rt.read_photo(path), which gives RGB."
    if home == "PIL":
        return 'Use np.array(image.convert("RGB")).'
    if home == "torch":
        return "Use tensor.cpu().numpy(), with the channels last and values from 0 to 255."
    if isinstance(frame, (list, tuple)) and any(hasattr(part, "shape") for part in frame):
        return "For several frames use engine.segment_batch(frames)."
    return "Use np.asarray(...)."


def _reshaping(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return " For a grey frame use cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB)."
    if len(shape) == 3 and shape[2] == 1:
        return " For a grey frame use np.repeat(frame, 3, axis=2)."
    if len(shape) == 3 and shape[2] == 4:
        return " To drop alpha use np.ascontiguousarray(frame[..., :3])."
    if len(shape) == 3 and shape[0] == 3:
        return " To move channels last use np.ascontiguousarray(frame.transpose(1, 2, 0))."
    if len(shape) == 4:
        return " Give one frame at a time, or use engine.segment_batch(frames)."
    return ""


def _scaling(frame: Any) -> str:
    """How values become 0 to 255, judged by the values that are there."""
    if frame.dtype.kind == "f":
        largest = float(np.max(frame, initial=0.0))
        if largest <= 1.0:
            return "For values from 0 to 1 use (frame * 255).round().astype(np.uint8)."
        return "For values from 0 to 255 use frame.round().clip(0, 255).astype(np.uint8)."
    if frame.dtype == np.uint16:
        return "For 16-bit values use (frame >> 8).astype(np.uint8)."
    if frame.dtype.kind in "iub":
        return "For values from 0 to 255 use frame.astype(np.uint8)."
    return "Convert it first."
