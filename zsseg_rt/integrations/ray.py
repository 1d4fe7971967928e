"""Label photos with Ray Data: a class for ``ray.data.Dataset.map_batches``."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.config import MAX_LANES, EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import (
    ArgumentError,
    BackendUnavailableError,
    ConfigError,
    DTypeError,
    ZssegError,
)
from zsseg_rt.integrations.batch import describe_classes, lanes_for
from zsseg_rt.photos import MAX_PIXELS, decode_photo
from zsseg_rt.results.visualize import encode_label_png, palette

__all__ = ["PhotoSegmenter"]


class PhotoSegmenter:
    """Labels the photos of a Ray data set; each of Ray's actors has an engine of its own.

    Rows come with a column ``bytes``, a photo's file as ``ray.data.read_binary_files`` reads it,
    or ``image``, uint8 RGB [H, W, 3]. That column is replaced by:

    - ``height`` and ``width`` in pixels;
    - ``mask``, a PNG whose pixel values are the labels, as :meth:`Segmentation.save` writes it;
    - ``classes``, a list of ``{name, index, pixels, share, colour}``, largest first;
    - ``unknown_share``, the part that belongs to no class, in [0, 1];
    - ``error``, one line on what was wrong with the photo; all of the above are null then.

    Args:
        bundle: A bundle folder that every node can read.
        classes: The classes, as for :meth:`Engine.set_classes`.
        config: Settings of the engine. Device ``"auto"`` becomes the GPU that Ray gave the actor
            (``num_gpus``, which may be a fraction), or the CPU if it gave none; ``num_threads=0``
            the CPUs that it gave (``num_cpus``), rounded up. None also chooses the lanes.
        max_pixels: Larger photos are not decoded.
        **naming: ``background`` and ``templates``, as for :meth:`Engine.set_classes`.

    Raises:
        ZssegError: As :class:`Engine` and its ``set_classes``.
    """

    def __init__(
        self,
        bundle: str | Path,
        classes: Any,
        *,
        config: EngineConfig | None = None,
        max_pixels: int = MAX_PIXELS,
        **naming: Any,
    ) -> None:
        if config is not None and config.channel_order != "rgb":
            raise ConfigError("channel_order: expected 'rgb', as photos are read, got 'bgr'")
        self._max_pixels = max_pixels
        self.engine = Engine(bundle, _placed(config))
        self.engine.set_classes(classes, **naming)
        self._lanes = self.engine.open_lanes()
        self._workers = ThreadPoolExecutor(self._lanes.num_lanes + 2)  # two decode or encode

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """Label the photos of a batch, several at the same time; usable from several threads."""
        columns = [name for name in ("bytes", "image") if name in batch]
        if len(columns) != 1:
            raise ArgumentError(
                "batch: expected one column of photos, bytes (read_binary_files) or image "
                f"(read_images), of NumPy arrays, got {columns}. Name one of them."
            )
        others = {name: rows for name, rows in batch.items() if name != columns[0]}
        return _table(others, self.label(batch[columns[0]], batch.get("path")))

    def label(self, photos: Sequence[Any], paths: Sequence[str] | None = None) -> list[Any]:
        """Label photos, each described in a dict of its new columns; ``paths`` are for messages."""
        names = [f"row {i}" for i in range(len(photos))] if paths is None else paths
        return list(self._workers.map(self._describe, photos, names))

    def _describe(self, photo: Any, name: str) -> dict[str, Any]:
        try:
            if isinstance(photo, bytes):
                photo = decode_photo(photo, Path(str(name)), max_pixels=self._max_pixels)
            if not isinstance(photo, np.ndarray):
                raise DTypeError(f"{name}: expected bytes or an array, got {type(photo).__name__}.")
            seg = self._lanes.segment(np.ascontiguousarray(photo))
        except BackendUnavailableError:
            raise
        except (ZssegError, OSError, MemoryError) as exc:
            reason = str(exc) or type(exc).__name__
            return {"error": reason if reason.startswith(name) else f"{name}: {reason}"}
        return {
            "height": seg.labels.shape[0],
            "width": seg.labels.shape[1],
            "mask": encode_label_png(seg.labels, palette(seg.names)),
            "classes": list(describe_classes(seg)),
            "unknown_share": float((seg.labels == seg.unknown).mean()),
        }


def _placed(config: EngineConfig | None) -> EngineConfig:
    """The settings with device and threads that Ray gave this actor; unchanged outside of Ray."""
    settings = config or EngineConfig()
    ray = sys.modules.get("ray")  # an actor has it loaded
    if ray and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        resources = ray.get_runtime_context().get_assigned_resources()
        if settings.device == "auto":  # an actor sees its own GPU only, so it is the first
            settings = replace(settings, device="cuda:0" if resources.get("GPU") else "cpu")
        if settings.num_threads == 0:
            settings = replace(settings, num_threads=max(math.ceil(resources.get("CPU", 0.0)), 1))
    return settings if config else replace(settings, num_lanes=lanes_for(MAX_LANES, settings))


def _table(others: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """Other columns as Ray stores them, and new ones, whose types are the same in every block."""
    with needs_extra("ray", "for Ray's tables"):
        import pyarrow as pa
    whole, real, text = pa.int32(), pa.float64(), pa.string()
    share = {"name": text, "index": whole, "pixels": pa.int64(), "share": real, "colour": text}
    types = {"height": whole, "width": whole, "mask": pa.binary()}
    types |= {"classes": pa.list_(pa.struct(list(share.items())))}
    types |= {"unknown_share": real, "error": text}
    if twice := sorted(types.keys() & others.keys()):
        raise ArgumentError(f"batch: has a column {twice[0]!r} already. Rename it: rename_columns.")
    new = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()}
    if others:
        from ray.data.block import BlockAccessor

        block = BlockAccessor.batch_to_arrow_block(dict(others))
        new = dict(zip(block.column_names, block.columns, strict=True)) | new
    return pa.table(new)
