"""Label photos with Ray Data: a class for ``ray.data.Dataset.map_batches``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.config import MAX_LANES, EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import (
    ArgumentError,
    BackendUnavailableError,
    ConfigError,
    DTypeError,
    SourceError,
    ZssegError,
)
from zsseg_rt.integrations.batch import lanes_for
from zsseg_rt.integrations.batch.budget import Budget
from zsseg_rt.integrations.batch.photo_run import describe_classes
from zsseg_rt.photos import decode_photo
from zsseg_rt.photos.files import pixels_of
from zsseg_rt.photos.header import MAX_PIXELS
from zsseg_rt.results.visualize import encode_label_png, palette
from zsseg_rt.text.background import Background
from zsseg_rt.text.class_names import ClassNames
from zsseg_rt.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["PhotoSegmenter"]

_INPUTS = ("bytes", "image")
_AHEAD = 2  # photos that are decoded or encoded while every lane is busy
_JPEG_QUALITY = 90


class PhotoSegmenter:
    """Labels the photos of a Ray data set; each of Ray's actors has an engine of its own.

    Several batches may be under way in an actor: photos of the next batch then take the lanes that
    the last photos of a batch leave free, while Ray fetches and hands on other batches. Ray allows
    one call at a time unless its actor pool says otherwise, as below.

    Rows come with a column ``bytes``, a photo's file as ``ray.data.read_binary_files`` reads it,
    or ``image``, uint8 RGB [H, W, 3]. That column is replaced by:

    - ``height`` and ``width`` in pixels;
    - ``mask``, a PNG whose pixel values are the labels, as :meth:`Segmentation.save` writes it;
    - ``overlay``, the photo under the labels' colours, if asked for;
    - ``classes``, a list of ``{name, index, pixels, share, colour}``, largest first;
    - ``unknown_share``, the part that belongs to no class, in [0, 1];
    - ``error``, one line on what was wrong with the photo; all of the above are null then.

    Args:
        bundle: A bundle folder that every node can read.
        classes: The classes, as for :meth:`Engine.set_classes`.
        background: As for :meth:`Engine.set_classes`.
        templates: Prompts with one ``{}`` each; the bundle's if None.
        config: Settings of the engine. Device ``"auto"`` becomes the GPU that Ray gave the actor
            (``num_gpus``, which may be a fraction), or the CPU if it gave none; ``num_threads=0``
            the CPUs that it gave (``num_cpus``), rounded up. None also chooses the lanes.
        overlay_format: ``"png"``, ``"jpg"`` (quality 90), or None for no overlays.
        alpha: Weight of the colours in overlays, in [0, 1].
        max_pixels: Larger photos are not decoded; as many are decoded at any one time.

    Raises:
        ArgumentError: The overlay's format is neither.
        ConfigError: The engine's channel order is not RGB.
        ZssegError: As :class:`Engine` and its ``set_classes``.

    Example:
        >>> photos = ray.data.read_binary_files("photos", include_paths=True)  # doctest: +SKIP
        >>> settings = {"bundle": "street.zsseg", "classes": ["road", "person"]}
        >>> pool = ray.data.ActorPoolStrategy(  # doctest: +SKIP
        ...     size=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ... )
        >>> photos.map_batches(
        ...     PhotoSegmenter,
        ...     fn_constructor_kwargs=settings,
        ...     compute=pool,
        ...     batch_size=32,
        ...     num_gpus=0.5,
        ... ).write_parquet("labels")  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: str | Path,
        classes: ClassNames | Vocabulary,
        *,
        background: Background = None,
        templates: Sequence[str] | None = None,
        config: EngineConfig | None = None,
        overlay_format: Literal["png", "jpg"] | None = None,
        alpha: float = 0.5,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if overlay_format not in ("png", "jpg", None):
            raise ArgumentError(
                f"overlay_format: expected png, jpg or None, got {overlay_format!r}"
            )
        if config is not None and config.channel_order != "rgb":
            raise ConfigError("channel_order: expected 'rgb', as photos are read, got 'bgr'")
        self._overlay_format, self._alpha = overlay_format, alpha
        self._max_pixels, self._pixels = max_pixels, Budget(max_pixels)
        self.engine = Engine(bundle, _placed(config))
        self.engine.set_classes(classes, background=background, templates=templates)
        engine = self.engine
        self._lanes = engine.open_lanes()
        self._workers = ThreadPoolExecutor(self._lanes.num_lanes + _AHEAD)

    def __call__(self, batch: Mapping[str, npt.NDArray[Any]]) -> pa.Table:
        """Label the photos of a batch, several at the same time; usable from several threads.

        Args:
            batch: The columns as NumPy arrays, Ray's default ``batch_format``.

        Returns:
            The columns but the photos', and the new ones; rows stay in their order.

        Raises:
            ArgumentError: The batch has another format, neither or both columns of photos, or a
                column with the name of a new one.
            BackendUnavailableError: OpenCV is not installed.
        """
        column = _input_column(batch)
        new = _arrow_columns(self.label(batch[column], batch.get("path")), self._overlay_format)
        kept = _arrow_table({name: rows for name, rows in batch.items() if name != column})
        if taken := sorted(new.keys() & kept.keys()):
            raise ArgumentError(
                f"batch: has a column {taken[0]!r} already. Rename it: ds.rename_columns(...)."
            )
        return _pyarrow().table(kept | new)

    def label(
        self,
        photos: Sequence[Any] | npt.NDArray[Any],
        paths: Sequence[str] | npt.NDArray[Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Label photos and describe them, each in a dict of the new columns that it has.

        Calls from several threads share the lanes; photos are begun in the order of the calls.

        Args:
            photos: Files' contents, or uint8 RGB [H, W, 3].
            paths: What to call them in messages.
        """
        names = [f"row {i}" for i in range(len(photos))] if paths is None else paths
        jobs = [
            self._workers.submit(self._describe, job) for job in zip(photos, names, strict=True)
        ]
        try:
            return [job.result() for job in jobs]
        finally:
            for job in jobs:
                job.cancel()  # those that have not begun, if one failed

    def _describe(self, photo: tuple[Any, Any]) -> dict[str, Any]:
        data, name = photo
        try:
            with self._pixels.taken(_pixels_of(data, name)):
                return self._segment(data, str(name))
        except BackendUnavailableError:
            raise
        except ZssegError as exc:
            message = str(exc) if str(exc).startswith(str(name)) else f"{name}: {exc}"
        except (OSError, MemoryError) as exc:
            message = f"{name}: {type(exc).__name__}: {exc}"
        return {"error": message}

    def _segment(self, data: Any, name: str) -> dict[str, Any]:
        frame = data
        if isinstance(data, bytes):
            frame = decode_photo(data, Path(name), max_pixels=self._max_pixels)
        seg = self._lanes.segment(np.ascontiguousarray(frame))
        height, width = seg.labels.shape
        row = {
            "height": height,
            "width": width,
            "mask": encode_label_png(seg.labels, palette(seg.names)),
            "classes": list(describe_classes(seg)),
            "unknown_share": float((seg.labels == seg.unknown).mean()),
        }
        if self._overlay_format is not None:
            row["overlay"] = _encoded(seg.overlay(frame, alpha=self._alpha), self._overlay_format)
        return row


def _placed(config: EngineConfig | None) -> EngineConfig:
    """The settings with device and threads that Ray gave this actor; unchanged outside of Ray."""
    chosen = config or EngineConfig()
    reserved = _reserved()
    if reserved is not None:
        num_gpus, num_cpus = reserved
        if chosen.device == "auto":
            chosen = replace(chosen, device="cuda:0" if num_gpus else "cpu")
        if chosen.num_threads == 0:
            chosen = replace(chosen, num_threads=max(math.ceil(num_cpus), 1))
    return chosen if config else replace(chosen, num_lanes=lanes_for(MAX_LANES, chosen))


def _reserved() -> tuple[float, float] | None:
    """GPUs and CPUs that Ray gave this actor; None outside of an actor.

    An actor sees its own GPU only, so it is the first.
    """
    try:
        import ray
    except ImportError:
        return None
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return None
    resources = ray.get_runtime_context().get_assigned_resources()
    return resources.get("GPU", 0.0), resources.get("CPU", 0.0)


def _input_column(batch: Any) -> str:
    if not isinstance(batch, Mapping):
        raise ArgumentError(
            f"batch: expected a dict of NumPy arrays, got {type(batch).__name__}. "
            'Call map_batches with batch_format="numpy", its default.'
        )
    found = [name for name in _INPUTS if name in batch]
    if len(found) != 1:
        raise ArgumentError(
            f"batch: expected one of the columns {' and '.join(_INPUTS)}, got "
            f"{', '.join(batch)}. Read photos with ray.data.read_binary_files or read_images."
        )
    return found[0]


def _pixels_of(data: Any, name: Any) -> int:
    """How many pixels a photo has."""
    if isinstance(data, np.ndarray):
        return data.size // 3
    if not isinstance(data, bytes):
        raise DTypeError(
            f"{name}: expected bytes or an array [H, W, 3], got {type(data).__name__}. "
            "Filter rows without a photo."
        )
    return pixels_of(data, name)


def _encoded(picture: npt.NDArray[np.uint8], kind: str) -> bytes:
    """An RGB picture as PNG or JPEG; its channels are swapped in place."""
    import cv2

    settings = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if kind == "jpg" else []
    swapped = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR, dst=picture)
    try:
        _, encoded = cv2.imencode(f".{kind}", swapped, settings)
    except cv2.error as exc:
        raise SourceError(f"overlay: cannot be encoded: {exc.err}") from exc
    return bytes(encoded.tobytes())


def _arrow_columns(rows: Sequence[Mapping[str, Any]], overlay_format: str | None) -> dict[str, Any]:
    """The new columns with their types, which are the same in every block."""
    pa = _pyarrow()
    share = {"name": pa.string(), "index": pa.int32(), "pixels": pa.int64()}
    share |= {"share": pa.float64(), "colour": pa.string()}
    types = {
        "height": pa.int32(),
        "width": pa.int32(),
        "mask": pa.binary(),
        "classes": pa.list_(pa.struct(list(share.items()))),
        "unknown_share": pa.float64(),
        "error": pa.string(),
    }
    if overlay_format is not None:
        types["overlay"] = pa.binary()
    return {name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()}


def _arrow_table(columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Other columns as Ray itself stores them."""
    if not columns:
        return {}
    from ray.data.block import BlockAccessor

    table = BlockAccessor.batch_to_arrow_block(dict(columns))
    return dict(zip(table.column_names, table.columns, strict=True))


def _pyarrow() -> Any:
    with needs_extra("ray", "for Ray's tables"):
        import pyarrow
    return pyarrow
