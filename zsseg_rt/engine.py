"""The engine: a bundle on a device, classes named at run time, a label for every pixel."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends import registry
from zsseg_rt.backends.base import BackendOptions, NodeTime
from zsseg_rt.backends.registry import load_graphs, load_text_encoder, precision_of, usable_cache
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import HeadSpec
from zsseg_rt.common.arrays import Array
from zsseg_rt.common.process import OwnProcess, refuse_gpu_after_fork, threads_in_quota
from zsseg_rt.common.recordings import Rotation
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import EngineStateError, ShapeError, VocabularyError
from zsseg_rt.results.segmentation import DeviceSegmentation, Segmentation
from zsseg_rt.runtime.families.base import BoundClasses
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.frame_memory import FrameMemory, check_family
from zsseg_rt.runtime.frames import Nv12Frame
from zsseg_rt.runtime.lane import Lane, Planes
from zsseg_rt.runtime.lane_pool import LanePool, in_order
from zsseg_rt.runtime.memory_plan import require_memory
from zsseg_rt.runtime.self_check import SelfCheck, check_against_golden, prove_plans
from zsseg_rt.stream.follow import Follow
from zsseg_rt.stream.runner import Policy, Stream, StreamParts
from zsseg_rt.stream.sinks import SinkTarget
from zsseg_rt.text.class_names import Background, ClassList, ClassNames
from zsseg_rt.text.embeddings import VocabularyMaker
from zsseg_rt.text.vocabulary import Vocabulary, refuse_beside_vocabulary


class Engine:
    """Labels frames with classes that are named, and renamed, while it runs.

    ``segment`` serves one thread at a time: a second call at the same moment raises
    :class:`EngineStateError`. For more at once, set ``EngineConfig(num_lanes=N)`` and open a
    :meth:`lane` per thread; lanes share the weights. ``set_classes`` may be called from any
    thread; the swap happens between frames.

    Args:
        bundle: A bundle folder, the name of one that was fetched (``"naclip-b16"``), or one already
            loaded.
        config: Device, backend, precision and the rest; see :class:`EngineConfig`.

    Raises:
        BundleError: The bundle is incomplete or altered.
        DeviceError: The device is absent.
        BackendUnavailableError: The backend's package is not installed.
        PrecisionNotApplied: The precision cannot be given.
        ConfigError: ``max_memory`` is too small; the message says what would fit.

    Example:
        >>> engine = Engine("street.zsseg")  # doctest: +SKIP
        >>> engine.set_classes(["road", "person", "forklift"])  # doctest: +SKIP
        >>> engine.segment(frame).present()  # doctest: +SKIP
    """

    def __init__(self, bundle: str | Path | Bundle, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        keeps_shape = self.config.windows or self.config.resize
        if self.bundle.preprocess.resize == "windows" and not keeps_shape:
            self.config = replace(self.config, windows="auto")
        self._family = create_family(self.bundle, self.config)
        refuse_gpu_after_fork(self.config.device)
        placement = registry.choose(self.config)
        self.backend, self.device = placement.backend, placement.device
        self._process = OwnProcess(self, self.device)
        require_memory(self.bundle, self._family, placement, self.config)
        threads = self.config.num_threads or threads_in_quota()
        cache = usable_cache(self.config.cache_folder)
        options = BackendOptions(
            num_threads=threads,
            num_sessions=self.config.num_lanes,
            cache_dir=cache,
            dynamic_axes=self._family.axes,
            node_times=self.config.with_node_times,
        )
        self._maker = VocabularyMaker(
            self.bundle,
            self._family.prompt_sets,
            partial(load_text_encoder, self.bundle, num_threads=threads, cache_dir=cache),
            cache_dir=cache,
            keep_encoder=self.config.keep_text_encoder,
        )
        self._graphs = load_graphs(
            self.bundle,
            self._family.graphs,
            placement=placement,
            precision=self.config.precision,
            allowed=self.bundle.auto_precisions(self._family.auto_precisions),
            options=options,
        )
        self._versions = itertools.count(1)
        self._vocabulary_lock = threading.Lock()
        self._lanes_lock = threading.Lock()
        self._classes: BoundClasses | None = None
        self._closed = False
        self._placement, self._lanes, self._spare = placement, set[Lane](), set[Lane]()
        self._lane = self.lane()
        try:
            prove_plans(self.bundle, self.config, self._graphs, self.self_check)
        except BaseException:
            self.close()
            raise

    @property
    def precision(self) -> str:
        """The precision the image encoder really runs at, or that of 8 bits if any graph does."""
        return precision_of(self._graphs)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The classes in force, or None before the first :meth:`set_classes`."""
        classes = self._classes
        return None if classes is None else classes.vocabulary

    def set_classes(
        self,
        class_names: ClassNames | Vocabulary,
        *,
        embeddings: npt.NDArray[np.float32] | None = None,
        background: Background = None,
        templates: Sequence[str] | None = None,
    ) -> Vocabulary:
        """Name the classes; every lane's next frame uses them.

        Args:
            class_names: One entry per class in label order: a name, or a list of synonyms whose
                first is the name; or a mapping from names to further synonyms; or a vocabulary that
                ``set_classes`` returned. A pixel takes the class of its best phrase.
            embeddings: float32 [P, D] to use as they are instead of the text encoder: one row per
                phrase, all classes' synonyms in order, then ``background``. A bundle with S sets of
                prompts (family ``proposals`` has two) also takes [S, P, D].
            background: Phrases that compete with the classes; pixels they win become unknown, and
                a class that is among them takes its phrase over. ``"auto"`` takes the published
                ones, or the bundle's own and what it sees beside the classes (docs/classes.md);
                ``Vocabulary.background`` has them. None: ``"auto"`` if the bundle has its own and
                no ``embeddings`` are given, else no phrases, as with ``()``.
            templates: Prompts with one ``{}`` each; the bundle's if None.

        Returns:
            The new vocabulary, with a version of its own.

        Raises:
            VocabularyError: No names, too many, empty or repeated ones; NaN; a name without an
                embedding; a vocabulary that lacks one of the bundle's sets of prompts.
            ShapeError, DTypeError: ``embeddings``, or those of a vocabulary, are not as above.
            ArgumentError: A vocabulary was given together with something it already holds.
            EngineStateError: The engine is closed.
        """
        self._require_open()
        if isinstance(class_names, Vocabulary):
            refuse_beside_vocabulary(embeddings, background, templates)
            self._maker.check(class_names)
            with self._vocabulary_lock:
                return self._put_in_force(class_names)
        if background is None and embeddings is not None:
            background = ()
        classes = self._maker.read(class_names, background, templates)
        with self._vocabulary_lock:
            self._require_open()
            if embeddings is None:
                vocabulary = self._maker.embed(classes, templates)
            else:
                vocabulary = self._maker.with_embeddings(classes, embeddings)
            return self._put_in_force(vocabulary)

    def segment(
        self,
        frame: npt.NDArray[np.uint8] | Nv12Frame | Planes,
        *,
        unknown_below: float | None = None,
        with_scores: bool | None = None,
        memory: FrameMemory | None = None,
        captured_at: float | None = None,
    ) -> Segmentation:
        """Label every pixel of a frame, in the engine's own lane.

        Args:
            frame: uint8 [H, W, 3], C-contiguous, in the configured channel order; or NV12 in two
                planes, an :class:`Nv12Frame` or a tuple.
            unknown_below: Score in [0, 1] below which a pixel is unknown; None: as configured.
            with_scores: Whether the result has a score per pixel; None: as configured.
            memory: The memory of the source's past frames; None labels the frame by itself.
            captured_at: When the frame was captured, in seconds, for the memory; None: now.

        Returns:
            Labels of the frame's own size, freshly owned.

        Raises:
            FrameError: The frame is none of these.
            VocabularyError: No classes have been named yet.
            BackendError: The graphs gave NaN or infinity.
            EngineStateError: The engine or the memory is closed, or busy in another thread.
        """
        self._require_open()
        return self._lane.segment(
            frame,
            unknown_below=unknown_below,
            with_scores=with_scores,
            memory=memory,
            captured_at=captured_at,
        )

    def segment_device(
        self,
        frame: Array | Nv12Frame | Planes,
        *,
        unknown_below: float | None = None,
        with_scores: bool | None = None,
        with_overlay: bool = False,
        alpha: float = 0.5,
    ) -> DeviceSegmentation:
        """Label a frame on the GPU and leave the labels there; otherwise as :meth:`segment`.

        Args:
            frame: uint8 [H, W, 3] on the GPU, with ``__dlpack__`` or ``__cuda_array_interface__``;
                or NV12 in two such planes, an :class:`Nv12Frame` or a tuple.
            unknown_below: As for :meth:`segment`.
            with_scores: As for :meth:`segment`.
            with_overlay: Whether the result has the frame with the labels' colours on it.
            alpha: Weight of the colours, in [0, 1].

        Raises:
            DeviceError: The engine is on the CPU.
        """
        self._require_open()
        return self._lane.segment_device(
            frame,
            unknown_below=unknown_below,
            with_scores=with_scores,
            with_overlay=with_overlay,
            alpha=alpha,
        )

    def frame_buffer(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Where a camera may write frames for :meth:`segment`, to save a copy.

        On CUDA it is pinned memory; an integrated GPU (Jetson) reads it in place. Calls with the
        same size give the same memory, up to eight sizes, and other frames of that size are copied
        there too: write and segment in turns. On the CPU it is a new ordinary array.

        Returns:
            uint8 [height, width, 3], of no certain content; each size is from 1 to 32767. It stays
            usable as an ordinary array when the engine is closed.

        Raises:
            ArgumentError: A size is out of range.
            EngineStateError: The engine is closed, or busy in another thread.
        """
        self._require_open()
        return self._lane.frame_buffer(height, width)

    def segment_batch(self, frames: Iterable[npt.NDArray[np.uint8]]) -> list[Segmentation]:
        """Label several frames, as many at the same time as ``EngineConfig(num_lanes=N)`` says.

        The bundle's graphs take one frame each: a batch is no larger run of the network. Results
        are in order; frames may differ in size, and an iterator is read as they are needed.

        Raises:
            ShapeError: One frame is given, not several.
            EngineStateError: The engine is closed or busy, or another of its lanes is open.
            ZssegError: What :meth:`segment` raises for one of the frames.
        """
        self._require_open()
        if isinstance(frames, Nv12Frame) or getattr(frames, "ndim", 0) == 3:
            raise ShapeError("frames: expected several, got one. Use engine.segment(frame).")
        with self.open_lanes() as pool:
            return list(in_order(pool.segment, frames, num_threads=pool.num_lanes))

    def stream(  # noqa: PLR0913 - what a stream is asked for, by name
        self,
        source: str | Path | Sequence[str | Path],
        *,
        policy: Policy | None = None,
        max_staleness: float | None = None,
        sinks: Sequence[SinkTarget] = (),
        alpha: float = 0.5,
        steady: bool = False,
        skip_still: bool = False,
        follow: Follow = False,
        every: int | None = None,
        rotation: Rotation | None = None,
    ) -> Stream:
        """Label the frames of cameras, videos or photos; each result carries its ``frame``.

        Of ``EngineConfig(num_lanes=N)``, files whose past frames do not matter take all lanes,
        cameras one. What is taken is busy until the stream is closed.

        Args:
            source: A URI or path (docs/streams.md lists them), ``@FILE`` with one per line, or
                several of them, which take turns.
            policy: ``"latest"`` labels the newest frame and drops older ones; ``"all"`` labels
                every frame while the source waits. None: ``latest`` for cameras, else ``all``.
            max_staleness: Seconds after which a frame that still waits is dropped; None keeps it.
            sinks: ``NAME.mp4``, ``NAME.jsonl``, ``NAME/`` for label pictures,
                ``rtsp://@:PORT/NAME`` for viewers, or functions.
            alpha: Weight of the colours in overlays, in [0, 1].
            steady: Whether labels are steadied along the motion; see :class:`FrameMemory`.
            skip_still: Whether frames that stand still get the last labels again.
            follow: Whether labels are moved along the optical flow to frames that are not labelled:
                with policy ``latest`` to every frame while the network labels the newest one in a
                thread of its own, with ``all`` to those between every ``every``-th. A result says
                so (``moved_from``, ``labelled_age``). Places where motion fails are unknown, or
                with ``"hold"`` keep their last label.
            every: With ``follow`` and policy ``all``: label one of so many frames, 2 to 64; the
                others take the labels of the nearer one.
            rotation: When sinks begin new files or folders, and what is kept; None begins none.

        Raises:
            ArgumentError: A source, sink or setting does not exist, or does not fit the family.
            SourceError: A list of sources cannot be read, the folder of a sink is absent, or its
                port cannot be had.
            BackendUnavailableError: PyAV or GStreamer is absent for a sink, OpenCV for a memory.
            EngineStateError: The engine is closed, or another lane is open that is needed.
        """
        self._require_open()
        if steady or skip_still:
            check_family(self.bundle.family)
        parts = StreamParts.open(
            source,
            self.config.channel_order,
            policy=policy,
            max_staleness=max_staleness,
            sinks=sinks,
            alpha=alpha,
            rotation=rotation,
            steady=steady,
            skip_still=skip_still,
            follow=follow,
            every=every,
        )
        return self.start_stream(parts)

    def start_stream(self, parts: StreamParts) -> Stream:
        """Start a stream of parts that are open."""
        lanes = self.open_lanes if self.config.num_lanes > 1 else None
        return parts.start(
            self.segment, lanes, self.device, lambda: getattr(self.vocabulary, "version", None)
        )

    def open_lanes(self) -> LanePool:
        """All lanes as one."""
        return LanePool(self.segment, self.lane, self.config.num_lanes)

    def lane(self, *, spare: bool = False) -> Lane:
        """Open a lane: one more frame that can be labelled at the same time, on the same weights.

        Up to ``EngineConfig.num_lanes`` may be open, the engine's own included. Close a lane to
        free its buffers; closing the engine closes all.

        Args:
            spare: Open one beyond that number, for images that come now and then: they and other
                lanes' frames wait for one run of a graph of each other at most.

        Raises:
            EngineStateError: The engine is closed, or as many lanes are open as are configured.
            BackendError: The backend has no room for another session.
            ConfigError: A spare lane does not fit into ``max_memory``.
        """
        self._process.require()
        with self._lanes_lock:
            self._require_open()
            lanes = self._spare if spare else self._lanes
            if spare:
                more = replace(self.config, num_lanes=self.config.num_lanes + 1)
                require_memory(self.bundle, self._family, self._placement, more)
            if len(lanes) >= (1 if spare else self.config.num_lanes):
                raise EngineStateError(
                    f"lanes: expected at most num_lanes={self.config.num_lanes}, the engine's own "
                    "included, got one more. Create the engine with "
                    f"EngineConfig(num_lanes={self.config.num_lanes + 1}), or close a lane."
                )
            lane = Lane(
                family=self._family,
                sessions={name: graph.session() for name, graph in self._graphs.items()},
                device=self.device,
                bundle=self.bundle,
                config=self.config,
                classes_in_force=self._classes_in_force,
                on_close=lanes.discard,
            )
            lanes.add(lane)
        return lane

    def _classes_in_force(self) -> BoundClasses:
        classes = self._classes
        self._require_open()  # closing forgets them first
        if classes is None:
            raise VocabularyError("class_names: expected classes, got none yet. "
                                  "Call set_classes([...]) first.")  # fmt: skip
        return classes

    def self_check(self) -> SelfCheck:
        """Run the bundle's golden sample and compare every intermediate with the stored ones.

        The sample's own channel order and threshold apply, not this engine's. With
        ``min_region_score`` the class scores may differ: that is what it trades for speed.

        Raises:
            BundleError: The bundle has no golden sample.
            EngineStateError: The engine is closed, or busy in another thread.
        """
        self._require_open()
        return check_against_golden(self.bundle, self._family, self.precision, self._run_golden)

    def node_times(
        self, frame: npt.NDArray[np.uint8], *, runs: int = 10
    ) -> dict[str, tuple[NodeTime, ...]]:
        """Time the nodes of every graph on what a frame feeds them; see :meth:`Lane.node_times`."""
        self._require_open()
        return self._lane.node_times(frame, runs=runs)

    def close(self) -> None:
        """Free graphs and buffers, after the frames under way. Calling it twice is harmless."""
        if not self._process.is_here:
            return
        with self._vocabulary_lock, self._lanes_lock:
            if self._closed:
                return
            self._closed = True
            self._classes = None
            with ExitStack() as parts:  # each also where another one fails, lanes first
                parts.callback(self._maker.release_encoder)
                for graph in self._graphs.values():
                    parts.callback(graph.close)
                for lane in (*self._lanes, *self._spare):
                    parts.callback(lane.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Engine({self.bundle.name!r}, backend={self.backend!r}, device={self.device!r}, "
            f"precision={self.precision!r})"
        )

    def _put_in_force(self, vocabulary: Vocabulary) -> Vocabulary:
        """Number a vocabulary and let every lane's next frame use it; the caller holds the lock."""
        self._require_open()
        numbered = replace(vocabulary, version=next(self._versions))
        with ops.thread_limit(self.config.num_threads):
            self._classes = self._family.bind(numbered, device=self.device)
        return numbered

    def _run_golden(
        self, frame: npt.NDArray[Any], names: Sequence[str], text: npt.NDArray[Any], head: HeadSpec
    ) -> dict[str, npt.NDArray[Any]]:
        vocabulary = self._maker.with_embeddings(ClassList.read(names), text)
        classes = self._family.bind(vocabulary, device=self.device)
        return self._lane.run_golden(frame, classes, head)

    def _require_open(self) -> None:
        self._process.require()
        if self._closed:
            raise EngineStateError("engine: is closed. Create a new Engine.")
