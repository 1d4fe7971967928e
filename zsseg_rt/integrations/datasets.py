"""Label photos of Hugging Face data sets: a function for ``datasets.Dataset.map``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt import __version__
from zsseg_rt.bundles.bundle import MANIFEST, Bundle
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.integrations import ray
from zsseg_rt.photos.files import from_pillow
from zsseg_rt.text.background import Background
from zsseg_rt.text.class_names import ClassNames, read_groups

__all__ = ["PhotoSegmenter"]


class PhotoSegmenter:
    """Labels the photos of a Hugging Face data set, in batches.

    A batch gets these columns beside its own:

    - ``mask``, an image whose pixel values are the labels, as :meth:`Segmentation.save` writes it;
    - ``classes``, a list of ``{name, index, pixels, share, colour}``, largest first;
    - ``unknown_share``, the part that belongs to no class, in [0, 1];
    - ``error``, one line on what was wrong with the photo; the others are null then.

    An engine is made in each process at its first batch. ``Dataset.map`` takes its cached results
    only if the bundle's content, the classes, the settings and this package's version are the same.

    Args:
        bundle: A bundle folder.
        classes: The classes, as for :meth:`Engine.set_classes`.
        background: As for :meth:`Engine.set_classes`.
        templates: Prompts with one ``{}`` each; the bundle's if None.
        config: Settings of the engine; None also chooses the lanes.
        column: The column of photos: images, or images that are not decoded.

    Raises:
        BundleError: The bundle is incomplete or altered.
        VocabularyError: The class names are unusable.

    Example:
        >>> segmenter = PhotoSegmenter("street.zsseg", ["road", "person"])  # doctest: +SKIP
        >>> photos.map(
        ...     segmenter, batched=True, batch_size=16, features=segmenter.features(photos.features)
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: str | Path,
        classes: ClassNames,
        *,
        background: Background = None,
        templates: Sequence[str] | None = None,
        config: EngineConfig | None = None,
        column: str = "image",
    ) -> None:
        read_groups(classes)
        self._bundle = Bundle.load(bundle).path
        self._settings: dict[str, Any] = {
            "classes": classes,
            "background": background,
            "templates": templates,
            "config": config,
        }
        self._column = column
        self._segmenter: ray.PhotoSegmenter | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What decides the results: ``Dataset.map`` hashes it, and sends it to its processes."""
        manifest = (self._bundle / MANIFEST).read_bytes()
        made_of = {"manifest": hashlib.sha256(manifest).hexdigest(), "version": __version__}
        return {**self.__dict__, "_segmenter": None, "_made_of": made_of}

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Label a batch of rows.

        Args:
            batch: The columns, as ``Dataset.map(..., batched=True)`` gives them.

        Returns:
            The new columns.

        Raises:
            ArgumentError: The batch has no such column, or is a single row.
            ZssegError: As :class:`Engine` and its ``set_classes``.
        """
        if self._column not in batch:
            raise ArgumentError(
                f"column: expected one of {', '.join(map(repr, batch))}, got {self._column!r}"
            )
        photos = batch[self._column]
        if _is_one(photos):
            raise ArgumentError(
                f"batch: expected rows, got one {type(photos).__name__}. "
                "Call map with batched=True."
            )
        rows = self._label(photos)
        columns = {name: [row.get(name) for row in rows] for name in _COLUMNS}
        columns["mask"] = [mask and {"bytes": mask, "path": None} for mask in columns["mask"]]
        return columns

    def features(self, given: Mapping[str, Any]) -> Any:
        """The types of the result's columns, ``datasets.Features``.

        Args:
            given: Those of the data set, ``Dataset.features``.

        Raises:
            ArgumentError: It has a column with the name of a new one.
            BackendUnavailableError: The package ``datasets`` is not installed.
        """
        with needs_extra("datasets", "for the types of columns"):
            import datasets
        if taken := sorted(_COLUMNS & given.keys()):
            raise ArgumentError(
                f"features: has a column {taken[0]!r} already. Rename it: rename_column(...)."
            )
        value = datasets.Value
        share = {"name": value("string"), "index": value("int32"), "pixels": value("int64")}
        share |= {"share": value("float64"), "colour": value("string")}
        new = {
            "mask": datasets.Image(),
            "classes": [share],
            "unknown_share": value("float64"),
            "error": value("string"),
        }
        return datasets.Features({**given, **new})

    def close(self) -> None:
        """Free this process's engine; the next batch makes another."""
        if self._segmenter is not None:
            self._segmenter.engine.close()
            self._segmenter = None

    def _label(self, photos: Sequence[Any]) -> list[dict[str, Any]]:
        """Describe photos; one that cannot be read has an error alone."""
        if self._segmenter is None:
            self._segmenter = ray.PhotoSegmenter(self._bundle, **self._settings)
        rows: dict[int, dict[str, Any]] = {}
        contents: dict[int, Any] = {}
        for index, photo in enumerate(photos):
            try:
                contents[index] = _content(photo)
            except SourceError as exc:
                rows[index] = {"error": str(exc)}
        names = [f"row {index} of its batch" for index in contents]
        labelled = self._segmenter.label(list(contents.values()), names)
        rows.update(zip(contents, labelled, strict=True))
        return [rows[index] for index in range(len(photos))]


_COLUMNS = frozenset({"mask", "classes", "unknown_share", "error"})


def _content(photo: Any) -> Any:
    """A file's content, or uint8 RGB [H, W, 3]."""
    try:
        if isinstance(photo, Mapping):  # an image that datasets did not decode
            content = photo.get("bytes")
            return Path(photo["path"]).read_bytes() if content is None else content
        if hasattr(photo, "convert"):  # Pillow's
            return from_pillow(photo, Path("photo"))
    except OSError as exc:
        raise SourceError(f"photo: expected a readable one, got {exc}") from exc
    return photo


def _is_one(photos: Any) -> bool:
    """Whether these are one photo instead of several."""
    is_array = isinstance(photos, np.ndarray) and photos.ndim == 3
    return is_array or isinstance(photos, Mapping) or hasattr(photos, "convert")
