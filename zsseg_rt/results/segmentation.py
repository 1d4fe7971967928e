"""Labels of a frame, and the frame of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.results.annotations import (
    Component,
    Polygon,
    find_components,
    outline,
    to_coco,
    to_detections,
    to_features,
    to_shapes,
    whole_classes,
)
from zsseg_rt.results.plot import LegendEntry, draw_names, enlarged, enlargement, legend_strip
from zsseg_rt.results.visualize import encode_label_png, palette, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zsseg_rt.ops import DeviceArray


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """How much of a frame a class covers."""

    name: str  # The class
    index: int  # Its label
    pixels: int  # Number of its pixels
    share: float  # Its part of the frame, in [0, 1]


@dataclass(frozen=True, kw_only=True, repr=False)
class Segmentation:
    """Labels of one frame, with the names they stand for.

    Attributes:
        labels: uint8 [H, W] indices into ``names``, 255 unknown; uint16 and 65535 above 254
            classes. Freshly owned.
        names: Class names in the caller's order.
        vocabulary_version: Version of the vocabulary that made the labels.
        scores: float32 [H, W], the winning class's activated value, or None.
        class_scores: float32 [C, gh, gw], every class's activated value at the resolution of the
            bundle's grid, best of its synonyms and without the bias of seen classes; None unless
            ``EngineConfig(with_class_scores="low")``.
        times: Milliseconds per stage, ``"total"`` included; see ``EngineConfig(with_times=...)``.
        frame: The frame that was labelled, in results of :meth:`Engine.stream`; None elsewhere.
        reused: Whether the labels are those of an earlier frame, because the picture stood still.
        moved_from: Index of the frame that was labelled, whose labels were moved along the optical
            flow to this one; None if this one was.
        labelled_age: Seconds since the frame that was labelled was captured, when this result was
            there; None outside streams.
        channel_order: Of the frame that was labelled, ``"rgb"`` or ``"bgr"``; pictures are drawn
            in the same order.
        candidates: Names that the frame was labelled with, the others having been left out; None
            unless ``EngineConfig(max_candidates=...)``.
    """

    labels: npt.NDArray[Any]
    names: tuple[str, ...]
    vocabulary_version: int
    scores: npt.NDArray[np.float32] | None = None
    times: Mapping[str, float] = field(default_factory=dict)
    frame: Frame | None = None
    reused: bool = False
    moved_from: int | None = None
    labelled_age: float | None = None
    channel_order: str = "rgb"
    class_scores: npt.NDArray[np.float32] | None = field(default=None)
    candidates: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return (
            f"Segmentation({width}x{height} {self.labels.dtype}, {len(self.names)} classes, "
            f"vocabulary_version={self.vocabulary_version})"
        )

    @property
    def unknown(self) -> int:
        """The label of a pixel that belongs to no class."""
        return int(np.iinfo(self.labels.dtype).max)

    def present(self) -> list[ClassShare]:
        """Return the classes in the frame, largest first; unknown pixels are not listed.

        Raises:
            DTypeError: The labels are neither uint8 nor uint16.
        """
        from zsseg_rt import ops

        counts = np.asarray(ops.count_labels(np.ascontiguousarray(self.labels), len(self.names)))
        total = max(self.labels.size, 1)
        order = [int(i) for i in np.argsort(-counts[:-1], kind="stable") if counts[i]]
        return [
            ClassShare(name=self.names[i], index=i, pixels=int(n), share=float(n / total))
            for i, n in zip(order, counts[order], strict=True)
        ]

    def top_k(self, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the best classes at each point of the grid.

        Args:
            k: How many, from 1 to the number of classes.

        Returns:
            Indices into ``names`` int64 [k, gh, gw] and their scores float32 [k, gh, gw], best
            first; of equal scores the lower index comes first.

        Raises:
            ArgumentError: ``k`` is out of range, or the result has no ``class_scores``.
        """
        if self.class_scores is None:
            raise ArgumentError(
                "class_scores: expected a result with scores of every class, got None. Create the "
                "engine with EngineConfig(with_class_scores='low')."
            )
        if not 1 <= k <= len(self.names):
            raise ArgumentError(f"k: expected from 1 to {len(self.names)} classes, got {k}")
        order = np.argsort(-self.class_scores, axis=0, kind="stable")[:k]
        return order, np.take_along_axis(self.class_scores, order, axis=0)

    def overlay(
        self,
        frame: npt.NDArray[np.uint8],
        *,
        alpha: float = 0.5,
        colours: npt.NDArray[np.uint8] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Blend the labels' colours onto the frame they were made from.

        Args:
            frame: uint8 [H, W, 3], in :attr:`channel_order`.
            alpha: Weight of the colours, in [0, 1].
            colours: uint8 [C, 3], in the frame's channel order; None takes
                :func:`zsseg_rt.results.visualize.palette` in that order.

        Returns:
            A new uint8 [H, W, 3]; unknown pixels stay as in the frame.

        Raises:
            ShapeError: The frame's size differs from the labels', or there are too few colours.
        """
        from zsseg_rt import ops

        colours = palette(self.names, self.channel_order) if colours is None else colours
        if len(colours) < len(self.names):
            raise ShapeError(
                f"colours: expected at least {len(self.names)} rows, got {len(colours)}"
            )
        blended: npt.NDArray[np.uint8] = ops.overlay(frame, self.labels, colours, alpha=alpha)
        return blended

    def plot(
        self,
        frame: npt.NDArray[np.uint8] | None = None,
        *,
        alpha: float = 0.5,
        names: bool = True,
        legend: bool = True,
    ) -> npt.NDArray[np.uint8]:
        """Draw the overlay with class names on it and a legend below, to be looked at.

        Letters can be read when the picture is shown at a phone's width; a frame narrower than 400
        pixels is enlarged by a whole factor. Letters beyond ASCII lose accents or become "?".

        Args:
            frame: As for :meth:`overlay`; None takes the frame that a stream's result carries.
            alpha: Weight of the colours, in [0, 1].
            names: Whether to write names on the larger parts.
            legend: Whether to add a strip with colours, names and shares below.

        Returns:
            A new uint8 [H', W', 3] in the frame's channel order.

        Raises:
            ArgumentError: No frame was given and the result carries none.
            ShapeError: The frame's size differs from the labels'.
            BackendUnavailableError: OpenCV is not installed.
        """
        image = frame if frame is not None or self.frame is None else self.frame.image
        if image is None:
            raise ArgumentError(
                "frame: expected the frame that was labelled, got None. Only results of a stream "
                "carry theirs."
            )
        factor = enlargement(self.labels.shape[1])
        canvas = enlarged(self.overlay(image, alpha=alpha), factor)
        if names:
            parts = [
                (part.name, enlarged(part.mask, factor), [factor * n for n in part.box[:2]])
                for part in self.components(min_area=max(1, self.labels.size // 200))
            ]
            draw_names(canvas, parts)
        entries = self.legend() if legend else []
        if not entries:
            return canvas
        return np.concatenate([canvas, legend_strip(canvas.shape[1], entries)])

    def legend(self) -> list[LegendEntry]:
        """The classes that are there, largest first, in the colours of :meth:`plot`."""
        colours = palette(self.names, self.channel_order).tolist()
        return [
            LegendEntry(one.name, one.share, tuple(colours[one.index])) for one in self.present()
        ]

    def save(self, path: str | Path) -> None:
        """Write the labels as a palette PNG whose pixel values are the labels (16-bit if uint16).

        The palette has the overlay's colours.

        Args:
            path: Must end in ``.png``: other formats would change labels.

        Raises:
            ArgumentError: The name ends differently.
            SourceError: The file cannot be written; nothing is left behind.
        """
        if Path(path).suffix.lower() != ".png":
            raise ArgumentError(
                f"path: expected a name that ends in .png, got {str(path)!r}. "
                "Labels are written as PNG, which leaves them unchanged."
            )
        save_file(path, encode_label_png(self.labels, palette(self.names)))

    def components(self, *, min_area: int = 1) -> list[Component]:
        """Return the connected parts of every class, largest first.

        Args:
            min_area: Smaller parts, in pixels, are left out.

        Raises:
            ArgumentError: ``min_area`` is below 1.
            BackendUnavailableError: OpenCV is not installed.
        """
        classes = [(share.index, share.name) for share in self.present()]
        return find_components(self.labels, classes, min_area=min_area, scores=self.scores)

    def polygons(self, *, min_area: int = 1, tolerance: float = 0.0) -> list[Polygon]:
        """Return the outline of every connected part, largest part first.

        Args:
            min_area: Smaller parts, in pixels, are left out.
            tolerance: How far, in pixels, a simplified outline may be from the exact one.

        Raises:
            ArgumentError: ``min_area`` is below 1, or ``tolerance`` below 0.
            BackendUnavailableError: OpenCV is not installed.
        """
        parts = self.components(min_area=min_area)
        return [outline(part, tolerance=tolerance) for part in parts]

    def to_coco_rle(
        self, *, image_id: int | str = 0, per_component: bool = False, min_area: int = 1
    ) -> list[dict[str, Any]]:
        """Return COCO annotations in uncompressed (column-major) RLE, with box and area.

        ``category_id`` is the index into ``names`` plus 1: COCO counts from 1. Errors are those of
        :meth:`components`.

        Args:
            image_id: The image's in the data set.
            per_component: An annotation per connected part instead of per class.
            min_area: Smaller connected parts, in pixels, are left out.
        """
        return to_coco(
            self._parts(per_component=per_component, min_area=min_area),
            size_hw=self._size_hw,
            image_id=image_id,
            with_scores=per_component,
        )

    def _parts(self, *, per_component: bool, min_area: int) -> list[Component]:
        if per_component:
            return self.components(min_area=min_area)
        classes = [(share.index, share.name) for share in self.present()]
        return whole_classes(self.labels, classes, self.scores)

    @property
    def _size_hw(self) -> tuple[int, int]:
        height, width = self.labels.shape
        return height, width

    def to_supervision(self, *, per_component: bool = False, min_area: int = 1) -> Any:
        """Return ``supervision.Detections``: a mask and box per class, confidence if scored.

        Arguments are those of :meth:`to_coco_rle`.

        Raises:
            ArgumentError: ``min_area`` is below 1.
            BackendUnavailableError: The package ``supervision``, or OpenCV for connected parts, is
                not installed.
        """
        parts = self._parts(per_component=per_component, min_area=min_area)
        return to_detections(parts, size_hw=self._size_hw, with_scores=self.scores is not None)

    def to_geojson(
        self,
        *,
        transform: Sequence[float] | None = None,
        min_area: int = 1,
        tolerance: float = 0.0,
    ) -> dict[str, Any]:
        """Return a GeoJSON feature collection: a polygon, with its holes, per connected part.

        ``transform``, ``(a, b, c, d, e, f)``, leads from pixels to a map: the corner at (x, y)
        pixels is at ``(a x + b y + c, d x + e y + f)``; rasterio's ``dataset.transform`` is one.
        None keeps pixels. Other arguments and errors are those of :meth:`polygons`.
        """
        parts = self.components(min_area=min_area)
        return to_features(parts, transform=transform, tolerance=tolerance)

    def to_labelme(
        self,
        image_path: str | Path,
        *,
        min_area: int = 1,
        tolerance: float = 0.0,
        unknown: str | None = "_background_",
    ) -> dict[str, Any]:
        """Return the content of a labelme file: a polygon per connected part, larger ones first.

        labelme's polygons have no holes. Drawn in order, the parts in a hole cover it; unknown
        pixels that could be in one, those away from the frame's edge, get polygons that are called
        ``unknown``, unless that is None. ``image_path`` is the image's, relative to the file's
        folder. Other arguments and errors are those of :meth:`polygons`.
        """
        parts = self.components(min_area=min_area)
        if unknown is not None:
            height, width = self._size_hw
            for part in find_components(self.labels, [(self.unknown, unknown)], min_area=min_area):
                if all(a != b for a, b in zip(part.box, (0, 0, width, height), strict=True)):
                    parts.append(part)
        return to_shapes(parts, size_hw=self._size_hw, image_path=image_path, tolerance=tolerance)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class DeviceSegmentation:
    """Labels of one frame in the memory of a GPU; made by :meth:`Engine.segment_device`.

    The arrays are the result's own, and whole: any stream may read them at once, through DLPack or
    ``__cuda_array_interface__``. Other attributes are those of :class:`Segmentation`.

    Attributes:
        labels: uint8 or uint16 [H, W] on the engine's GPU, values as in :class:`Segmentation`.
        scores: float32 [H, W] on the engine's GPU, the winning class's activated value, or None.
        picture: uint8 [H, W, 3] on the engine's GPU, the frame's overlay in ``channel_order``, or
            None.
    """

    labels: DeviceArray
    names: tuple[str, ...]
    vocabulary_version: int
    scores: DeviceArray | None = None
    picture: DeviceArray | None = None
    times: Mapping[str, float] = field(default_factory=dict)
    channel_order: str = "rgb"
    candidates: tuple[str, ...] | None = None

    @property
    def device(self) -> str:
        """The GPU that holds the arrays, as ``"cuda:N"``."""
        return self.labels.device

    @property
    def unknown(self) -> int:
        """The label of a pixel that belongs to no class."""
        return int(np.iinfo(self.labels.dtype).max)

    def to_host(self) -> Segmentation:
        """Copy the labels, and scores if there are any, to host memory.

        Raises:
            CudaError: The copy failed.
        """
        return Segmentation(
            labels=self.labels.numpy(),
            names=self.names,
            vocabulary_version=self.vocabulary_version,
            scores=None if self.scores is None else self.scores.numpy(),
            times=self.times,
            channel_order=self.channel_order,
        )

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return (
            f"DeviceSegmentation({width}x{height} {self.labels.dtype} on {self.device}, "
            f"{len(self.names)} classes, vocabulary_version={self.vocabulary_version})"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One frame of a stream, and where it came from.

    Attributes:
        source: The source's URI, without its password.
        index: Position among the frames that the source has given, from 0; reconnecting does not
            begin anew, and gaps are frames that were dropped.
        captured_at: Seconds of ``time.monotonic()``.
        clock: Whose time that is: ``"driver"``, the camera's driver, at capture; ``"pipeline"``,
            the GStreamer element's that the frame came from; ``"arrival"``, ours, when the frame
            arrived; ``"file"``, ours, when it was read from a file.
        pts_seconds: The stream's own time stamp in seconds, or None.
        dropped_before: Frames of this source that were dropped since the one handed out before.
        image: uint8 [H, W, 3], in the engine's channel order. Of a frame that lies on a GPU it is
            made when it is first asked for.
        on_gpu: The frame on the engine's GPU, as ``segment_device`` takes it, or None. Of frames
            that are kept, a stream's 32 newest stay there.
    """

    source: str
    index: int
    captured_at: float
    clock: Literal["driver", "pipeline", "arrival", "file"]
    pts_seconds: float | None = None
    dropped_before: int = 0
    image: npt.NDArray[np.uint8] = field(repr=False)
    on_gpu: Any = field(default=None, repr=False, compare=False)

    def leave_gpu(self) -> None:
        """Make ``image``, and hold no memory of the GPU any more: ``on_gpu`` becomes None."""
        vars(self).update(image=self.image, on_gpu=None)


class _Image:
    """The attribute ``image``: an array, or what makes it when it is asked for."""

    def __get__(self, frame: Frame, kind: type[Frame]) -> npt.NDArray[np.uint8]:
        image = vars(frame)["image"]
        if callable(image):
            image = vars(frame)["image"] = image()
        pixels: npt.NDArray[np.uint8] = image
        return pixels

    def __set__(self, frame: Frame, image: object) -> None:
        vars(frame)["image"] = image


Frame.image = _Image()  # type: ignore[assignment]  # no default, which it would be inside
