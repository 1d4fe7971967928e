"""Put a stream together: sources, what past frames left behind, and sinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zsseg_rt.common.recordings import Rotation
from zsseg_rt.errors import ArgumentError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.runtime.frame_memory import FrameMemory
from zsseg_rt.runtime.lane_pool import LanePool
from zsseg_rt.stream.follow import Follow, Following, following_of
from zsseg_rt.stream.gstreamer.pipelines import GstSource
from zsseg_rt.stream.runner import POLICIES, Policy, Stream
from zsseg_rt.stream.sinks import SinkTarget, open_writers
from zsseg_rt.stream.source import Source
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.video import VideoSource
from zsseg_rt.stream.watch import Patience
from zsseg_rt.stream.writers import Writer

_ON_GPUS = (GstSource, VideoSource)


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """The settings of a stream; :meth:`zsseg_rt.Engine.stream` says what each means.

    ``follow`` None is on for cameras of which the newest frame counts; with ``loop``, video files
    begin again at their end.
    """

    policy: Policy | None = None
    max_staleness: float | None = None
    patience: Patience | None = None
    sinks: Sequence[SinkTarget] = ()
    alpha: float = 0.5
    legend: bool = False
    rotation: Rotation | None = None
    steady: bool = False
    skip_still: bool = False
    follow: Follow | None = False
    every: int | None = None
    loop: bool = False

    def __post_init__(self) -> None:
        if self.policy is not None and self.policy not in POLICIES:
            raise ArgumentError(
                f"policy: expected one of {', '.join(POLICIES)}, got {self.policy!r}"
            )
        seconds: Any = self.max_staleness
        is_number = isinstance(seconds, (int, float))
        if seconds is not None and not (is_number and 0.0 < seconds < math.inf):
            raise ArgumentError(f"max_staleness: expected seconds above 0, got {seconds}")

    def open(self, source: str | Path | Sequence[str | Path], channel_order: str) -> StreamParts:
        sources = open_sources(source, channel_order)
        if self.loop:
            sources = [
                replace(one, loops=True) if isinstance(one, VideoSource) and not one.live else one
                for one in sources
            ]
        following = following_of(self.follow, self.every, self.policy, sources, channel_order)
        memories = None
        if self.steady or self.skip_still:
            memories = {
                one.name: FrameMemory(steady=self.steady, skip_still=self.skip_still)
                for one in sources
            }
        writers = open_writers(
            self.sinks,
            channel_order=channel_order,
            alpha=self.alpha,
            legend=self.legend,
            sources=[one.name for one in sources],
            rotation=self.rotation,
        )
        return StreamParts(
            options=self, sources=sources, memories=memories, following=following, writers=writers
        )


@dataclass(frozen=True, kw_only=True)
class StreamParts:
    """The parts of a stream."""

    options: StreamOptions
    sources: Sequence[Source]
    memories: Mapping[str, FrameMemory] | None
    following: Following | None
    writers: Sequence[Writer]

    @property
    def takes_lanes(self) -> bool:
        """Whether several frames can be labelled at the same time: no source is a camera."""
        waits = self.options.policy != "latest" and not any(one.live for one in self.sources)
        return waits and self.memories is None and self.following is None

    def start(
        self,
        segment: Callable[..., Segmentation],
        open_lanes: Callable[[], LanePool] | None,
        device: str = "cpu",
        version: Callable[[], int | None] = lambda: None,
    ) -> Stream:
        """The stream; ``device`` is where ``segment`` also takes frames."""
        try:
            lanes = open_lanes() if open_lanes is not None and self.takes_lanes else None
        except BaseException:
            for writer in self.writers:
                writer.close()
            raise
        return Stream(
            self.sources if self.memories else on_device(self.sources, device),
            segment,
            policy=self.options.policy,
            max_staleness=self.options.max_staleness,
            patience=self.options.patience,
            writers=self.writers,
            memories=self.memories,
            following=self.following,
            version=version,
            lanes=lanes,
        )


def on_device(sources: Sequence[Source], device: str) -> list[Source]:
    """The sources, of which those that can hand over frames in a GPU's memory do so."""
    return [replace(one, device=device) if isinstance(one, _ON_GPUS) else one for one in sources]
