"""What stays on the page when a source has ended: its last picture, with the classes of now."""

from __future__ import annotations

from dataclasses import replace

from zsseg_rt.errors import EngineStateError
from zsseg_rt.server.hub import Hub
from zsseg_rt.server.preview import frame_of
from zsseg_rt.stream.runner import SourceStats, Stream


class LastPictures:
    """Labels the last pictures of sources that have ended anew, after each change."""

    def __init__(self, stream: Stream, hub: Hub) -> None:
        self._stream, self._hub = stream, hub
        self._thresholds: dict[str, float] = {}  # with which each source's picture was labelled

    def look(self) -> None:
        """Label what is out of date."""
        for name, stats in self._stream.stats().items():
            if _is_over(stats):
                self._bring_up_to_date(name)
            else:
                self._thresholds[name] = self._hub.labeller.unknown_below

    def _bring_up_to_date(self, name: str) -> None:
        labeller, result = self._hub.labeller, self._hub.newest(name, {})
        if result is None:
            return
        threshold = labeller.unknown_below
        version = labeller.vocabulary.version
        told = result.seg.vocabulary_version, self._thresholds.setdefault(name, threshold)
        if told == (version, threshold):
            return
        frame = frame_of(result.seg)
        try:
            seg = labeller.segment_beside(frame.image)
        except EngineStateError:  # the engine was closed meanwhile
            return
        self._thresholds[name] = threshold
        self._hub.publish(replace(seg, frame=frame), is_new=False)


def _is_over(stats: SourceStats) -> bool:
    """Whether all frames of a source that has ended were given out."""
    return stats.state == "ended" and stats.captured == stats.given_out + stats.dropped
