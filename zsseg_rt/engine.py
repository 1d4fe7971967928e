"""The engine: a bundle on a device, classes named at run time, a label for every pixel."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends import registry
from zsseg_rt.backends.base import BackendOptions, Session
from zsseg_rt.bundle import Bundle, HeadSpec
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import (
    BackendError,
    BundleError,
    EngineStateError,
    PrecisionNotApplied,
    ShapeError,
    VocabularyError,
)
from zsseg_rt.pipelines.base import (
    BoundClasses,
    LabelRule,
    Masks,
    Pipeline,
    PipelineFactory,
    Trace,
)
from zsseg_rt.pipelines.dense import DensePipeline
from zsseg_rt.pipelines.descriptor import DescriptorPipeline
from zsseg_rt.pipelines.proposals import ProposalsPipeline, with_min_score
from zsseg_rt.pipelines.segment_tokens import SegmentTokensPipeline
from zsseg_rt.result import Segmentation
from zsseg_rt.self_check import SelfCheck, check_against_golden
from zsseg_rt.text.embeddings import PhraseEmbedder, read_embeddings
from zsseg_rt.text.prompts import check_templates
from zsseg_rt.vocabulary import ClassNames, Vocabulary, read_class_specs
from zsseg_rt.workspace import StageClock, Workspace, reshaped

__all__ = ["Engine"]

_log = logging.getLogger(__name__)
_PIPELINES: dict[str, PipelineFactory] = {
    "dense": DensePipeline,
    "descriptor": DescriptorPipeline,
    "proposals": ProposalsPipeline,
    "segment_tokens": SegmentTokensPipeline,
}


class Engine:
    """Labels frames with classes that are named, and renamed, while it runs.

    One engine serves one thread at a time: a second ``segment`` at the same moment raises
    :class:`EngineStateError`. ``set_classes`` may be called from any thread; the swap happens
    between frames.

    Args:
        bundle: A bundle folder, or one already loaded.
        config: Device, backend, precision and the rest; see :class:`EngineConfig`.

    Raises:
        BundleError: The bundle is incomplete or altered.
        DeviceError: The device is absent.
        BackendUnavailableError: The backend's package is not installed.
        PrecisionNotApplied: The precision cannot be given.

    Example:
        >>> engine = Engine("street.zsseg")  # doctest: +SKIP
        >>> engine.set_classes(["road", "person", "forklift"])  # doctest: +SKIP
        >>> engine.segment(frame).present()  # doctest: +SKIP
    """

    def __init__(self, bundle: str | Path | Bundle, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self.bundle = with_min_score(loaded, self.config.min_region_score)
        placement = registry.choose(self.config)
        self.backend, self.device = placement.backend, placement.device
        self._options = BackendOptions(
            num_threads=self.config.num_threads,
            cache_dir=self.config.cache_folder,
            dynamic_axes=_dynamic_axes(self.bundle),
        )
        if self.config.num_threads:
            ops.set_num_threads(self.config.num_threads)
        self._workspace = Workspace(self.device)
        self._pipeline: Pipeline = _PIPELINES[self.bundle.family](
            self.bundle, self._load_graph, self._workspace
        )
        _check_sizes(self.bundle, self._pipeline.sessions["image_encoder"])
        self._embedder = PhraseEmbedder(
            self.bundle, self._load_text_encoder, self._options.cache_dir
        )
        self._rule = LabelRule(
            head=self.bundle.head,
            unknown_below=self.config.unknown_below,
            with_scores=self.config.with_scores,
        )
        self._versions = itertools.count(1)
        self._vocabulary_lock = threading.Lock()
        self._frame_lock = threading.Lock()
        self._classes: BoundClasses | None = None
        self._closed = False

    @property
    def precision(self) -> str:
        """The precision the image encoder really runs at."""
        return self._pipeline.sessions["image_encoder"].precision

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The classes in force, or None before the first :meth:`set_classes`."""
        classes = self._classes
        return None if classes is None else classes.vocabulary

    def set_classes(
        self,
        class_names: ClassNames,
        *,
        embeddings: npt.NDArray[np.float32] | None = None,
        background: Sequence[str] = (),
        templates: Sequence[str] | None = None,
    ) -> Vocabulary:
        """Name the classes; the next frame uses them.

        Args:
            class_names: One entry a class in the order of the labels: a name, or a list of
                synonyms whose first is the name. A pixel takes the class of its best phrase.
            embeddings: float32 [P, D] to use instead of the text encoder, used as they are; one
                row a phrase: all classes' synonyms in order, then ``background``. A bundle that
                embeds with two sets of prompts (family ``proposals``) also takes [2, P, D], the
                segments' and then the regions'; one set serves for both.
            background: Phrases that compete with the classes; pixels they win are unknown.
            templates: Prompts with one ``{}`` each; the bundle's if None.

        Returns:
            The new vocabulary.

        Raises:
            VocabularyError: No, empty, repeated or too many names; NaN; a name without embedding.
            ShapeError: ``embeddings`` has another shape.
            DTypeError: ``embeddings`` is not float32.
            EngineStateError: The engine is closed.
        """
        self._require_open()
        specs = read_class_specs(class_names, background, max_phrases=self.bundle.head.max_classes)
        with self._vocabulary_lock:
            self._require_open()
            if embeddings is None:
                chosen = None if templates is None else check_templates(templates)
                embeds = self._embedder.embed(specs.phrases, chosen)
                region_embeds = self._embedder.embed_for_regions(specs.phrases, chosen)
                if not self.config.keep_text_encoder:
                    self._embedder.release_encoder()
            else:
                embeds, region_embeds = read_embeddings(embeddings, len(specs.phrases), self.bundle)
            vocabulary = Vocabulary(
                names=specs.names,
                phrases=specs.phrases,
                phrase_classes=specs.phrase_classes,
                embeds=embeds,
                version=next(self._versions),
                region_embeds=region_embeds,
            )
            self._classes = self._pipeline.bind(vocabulary)
        return vocabulary

    def segment(self, frame: npt.NDArray[np.uint8]) -> Segmentation:
        """Label every pixel of a frame.

        Args:
            frame: uint8 [H, W, 3], C-contiguous, any size from 1x1 up, in the configured channel
                order. Borrowed until the call returns.

        Returns:
            Labels of the frame's own size, freshly owned.

        Raises:
            ShapeError: The frame is not [H, W, 3], is empty, or is not C-contiguous.
            DTypeError: The frame is not uint8.
            VocabularyError: No classes were named yet.
            EngineStateError: The engine is closed, or busy in another thread.
            BackendError: The graphs gave NaN or infinity, or the backend failed.
        """
        with self._exclusive():
            classes = self._classes
            if classes is None:
                raise VocabularyError("class_names: expected classes, none named yet. "
                                      "Call set_classes([...]) first.")  # fmt: skip
            return self._segment(frame, classes, self._rule)

    def self_check(self) -> SelfCheck:
        """Run the bundle's golden sample and compare every intermediate with the stored ones.

        The sample's own channel order and threshold apply, not this engine's. With
        ``min_region_score`` the class scores may differ: that is what it trades for speed.

        Returns:
            One line a stage with its error and tolerance; ``passed`` tells the verdict.

        Raises:
            BundleError: The bundle has no golden sample.
        """
        with self._exclusive():
            return check_against_golden(self.bundle, self.precision, self._run_golden)

    def close(self) -> None:
        """Free graphs and buffers, after the frame under way. Calling it twice is harmless."""
        with self._frame_lock, self._vocabulary_lock:
            if self._closed:
                return
            self._closed = True
            for session in self._pipeline.sessions.values():
                session.close()
            self._embedder.release_encoder()
            self._classes = None
            self._workspace.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Engine({self.bundle.name!r}, backend={self.backend!r}, device={self.device!r}, "
            f"precision={self.precision!r})"
        )

    def _segment(
        self,
        frame: npt.NDArray[np.uint8],
        classes: BoundClasses,
        rule: LabelRule,
        trace: Trace | None = None,
    ) -> Segmentation:
        _check_frame(frame)
        clock = self._workspace.clock()
        masks, space = self._masks(frame, classes, clock, trace), self._workspace
        finite = ops.all_finite(
            masks.mask_logits, out=space.array("finite", (1,), np.uint8), stream=space.stream
        )
        clock.mark("check")
        host_labels, host_scores = masks.label(frame.shape[:2], classes, rule, space, clock)
        if not space.fetch(finite)[0]:
            raise BackendError(
                f"mask_logits: expected finite numbers, got NaN or infinity at precision "
                f"{self.precision}. Use precision='float32' and run self_check(), which tells "
                "whether the weights are sound."
            )
        if not classes.vocabulary.is_plain:
            host_labels = classes.vocabulary.label_table[host_labels]
        clock.mark("results")
        space.synchronize()
        return Segmentation(
            labels=host_labels,
            names=classes.vocabulary.names,
            vocabulary_version=classes.vocabulary.version,
            scores=host_scores,
            times=MappingProxyType(clock.times()),
        )

    def _masks(
        self,
        frame: npt.NDArray[np.uint8],
        classes: BoundClasses,
        clock: StageClock,
        trace: Trace | None,
    ) -> Masks:
        spec, space = self.bundle.preprocess, self._workspace
        source = space.upload("frame", frame)
        pixels = ops.preprocess(
            source,
            size_hw=spec.size_hw,
            mean=spec.mean,
            std=spec.std,
            channel_order=self.config.channel_order,
            out=space.array("image", (3, *spec.size_hw), np.float32),
            stream=space.stream,
        )
        image = reshaped(pixels, (1, 3, *spec.size_hw))
        clock.mark("preprocess")
        if trace is not None:
            trace["image"] = image
        return self._pipeline.masks(image, classes, clock, trace)

    def _run_golden(
        self,
        frame: npt.NDArray[np.uint8],
        names: Sequence[str],
        embeds: npt.NDArray[np.float32],
        head: HeadSpec,
    ) -> dict[str, npt.NDArray[Any]]:
        specs = read_class_specs(names)
        given, region_embeds = read_embeddings(embeds, len(specs.phrases), self.bundle)
        vocabulary = Vocabulary(
            names=specs.names,
            phrases=specs.phrases,
            phrase_classes=specs.phrase_classes,
            embeds=given,
            version=0,
            region_embeds=region_embeds,
        )
        trace: Trace = {}
        if self.config.channel_order == "bgr":
            frame = np.ascontiguousarray(frame[..., ::-1])  # the sample is RGB
        rule = LabelRule(head=head, unknown_below=None, with_scores=False)
        result = self._segment(frame, self._pipeline.bind(vocabulary), rule, trace)
        stages = {name: np.array(self._workspace.fetch(array)) for name, array in trace.items()}
        return stages | {"labels": result.labels}

    def _load_graph(self, name: str) -> Session:
        wanted = self.config.precision
        # Graphs that decide within themselves (ZeroSeg's groups) turn rounding into other labels.
        if wanted == "auto" and self.bundle.segments and "float32" in self.bundle.graphs[name]:
            wanted = "float32"
        entry = self.bundle.graph(name, wanted)
        session = registry.get_backend(self.backend).load(
            self.bundle.open_path(entry),
            device=self.device,
            precision=wanted,
            options=self._options,
        )
        if wanted not in ("auto", session.precision):
            raise PrecisionNotApplied(
                f"precision: expected {wanted}, got {session.precision} from {self.backend} for "
                f"{name}. Use precision='auto' or another backend."
            )
        _log.info("%s: %s on %s at %s", name, self.backend, self.device, session.precision)
        return session

    def _load_text_encoder(self) -> Session:
        backend = "openvino" if registry.is_installed("openvino") else "torch"
        entry = self.bundle.graph("text_encoder", "float32")
        return registry.get_backend(backend).load(
            self.bundle.open_path(entry),
            device="cpu",
            precision="float32",
            options=BackendOptions(
                num_threads=self.config.num_threads, cache_dir=self._options.cache_dir
            ),
        )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._frame_lock.acquire(blocking=False):
            raise EngineStateError(
                "engine: is busy in another thread. Make one engine a thread, or take turns."
            )
        try:
            self._require_open()
            yield
        finally:
            self._frame_lock.release()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineStateError("engine: is closed. Make a new Engine.")


def _check_sizes(bundle: Bundle, encoder: Session) -> None:
    """Refuse a manifest whose sizes are not its graph's."""
    gives = {spec.name: spec.shape for spec in (*encoder.inputs, *encoder.outputs)}
    grid_h, grid_w = bundle.head.grid_hw
    stated = {
        "preprocess.size_hw": ("image", 2, bundle.preprocess.size_hw),
        "head.grid_hw": ("patch_embeds", 1, (grid_h * grid_w,)),
    }
    for key, (name, axis, sizes) in stated.items():
        found = gives.get(name, ())[axis : axis + len(sizes)]
        if any(isinstance(a, int) and a != b for a, b in zip(found, sizes, strict=False)):
            raise BundleError(
                f"{bundle.path / 'bundle.json'}: {key}: expected what the graph's {name} "
                f"{list(gives[name])} has, got {sizes}. Export the bundle again."
            )


def _dynamic_axes(bundle: Bundle) -> dict[str, tuple[int, int, int]]:
    """Smallest, usual and largest size of every axis that graphs leave open."""
    most = bundle.head.max_classes
    axes = {"classes": (1, min(32, most), most)}
    if bundle.regions is not None and bundle.regions.encoder is not None:
        batch = bundle.regions.encoder.batch
        axes["regions"] = (1, batch, batch)
    return axes


def _check_frame(frame: Any) -> None:
    if not isinstance(frame, np.ndarray):
        raise ShapeError(
            f"frame: expected a uint8 NumPy array [H, W, 3], got {type(frame).__name__}"
        )
