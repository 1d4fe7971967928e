"""``zsseg-rt stream``: label cameras, videos and photos as they come."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.groups import (
    MemoryOptions,
    WordOptions,
    choose_bundle,
    demo_source,
    opt,
    takes_groups,
)
from zsseg_rt.cli.options import (
    AlphaOption,
    BundleOption,
    DemoOption,
    JsonOption,
    WaitOption,
    argument_errors_are_usage,
)
from zsseg_rt.cli.output import describe_engine, say, terminal, write_json
from zsseg_rt.cli.service import Notifier, stopped_by_signals
from zsseg_rt.common.schema import printable
from zsseg_rt.config import MAX_LANES, EngineConfig
from zsseg_rt.errors import SourceError

if TYPE_CHECKING:
    from zsseg_rt.engine import Engine
    from zsseg_rt.results.segmentation import Segmentation
    from zsseg_rt.stream.runner import SourceStats, Stream
    from zsseg_rt.stream.sinks import SinkStats

DEMO_FRAMES = 300
_REDRAW = 0.5  # seconds
_MOST_PLACES = 40  # that a report names of a sink


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """Which frames are labelled, and until when."""

    frames: int | None = opt("Stop after this many frames; default with --demo: 300.", min=1)
    seconds: float | None = opt("Stop after this many seconds.", min=0.0)
    policy: str | None = opt(
        "latest (drop old frames) or all (the source waits); default: latest for cameras, else all."
    )
    follow: bool = opt(
        "Move labels along the motion to frames that the network does not label.", False, "--follow"
    )
    every: int | None = opt("With --follow and policy all: label one of so many frames.")
    max_staleness: float | None = opt("Drop frames that waited longer than this many seconds.")
    wait: WaitOption = False

    def settings(self) -> dict[str, Any]:
        """The stream's."""
        from zsseg_rt.stream.watch import Patience

        patience = Patience(at_start=self.wait)
        settings = {key: getattr(self, key) for key in ("policy", "follow", "every")}
        return {**settings, "max_staleness": self.max_staleness, "patience": patience}


@dataclass(frozen=True, kw_only=True)
class _Files:
    """How sinks write, and the file that says how it went."""

    rotate: str | None = opt(
        "Begin new files after 10min, at 500MB, or whichever comes first: 10min,500MB.",
        metavar="TIME,SIZE",
    )
    keep: str | None = opt(
        "With --rotate: remove old files after 7d, beyond 20GB per source, or both.",
        metavar="TIME,SIZE",
    )
    alpha: AlphaOption = 0.5
    legend: bool = opt(
        "Add a legend of colours, names and shares below overlay frames.", False, "--legend"
    )
    json_file: JsonOption = None

    def settings(self) -> dict[str, Any]:
        """The stream's."""
        from zsseg_rt.common.recordings import Rotation

        rotation = Rotation.parse(self.rotate, self.keep)
        return {"alpha": self.alpha, "legend": self.legend, "rotation": rotation}


@takes_groups
def stream(
    *,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE [SINK]...",
            help="A camera, video or photos, @FILE with one per line; then NAME.mp4, NAME.jsonl, "
            "NAME/ for label images, rtsp://@:PORT/NAME to be watched. --demo needs no source.",
        ),
    ] = None,
    bundle: BundleOption = None,
    demo: DemoOption = None,
    words: WordOptions,
    pace: _Pace,
    files: _Files,
    memory: MemoryOptions,
    run: EngineConfig,
) -> None:
    """Label every frame of cameras, videos or photos, and write the results.

    A lost camera is reopened. Ctrl-C (SIGTERM, SIGHUP) ends the stream and finishes its
    files. docs/streams.md describes sources, sinks and policies.
    """
    from zsseg_rt.engine import Engine
    from zsseg_rt.integrations.batch import lanes_for
    from zsseg_rt.stream.opening import StreamOptions
    from zsseg_rt.stream.uris import is_source

    lacking = "name a source: a camera, video, folder or @FILE"
    folder = choose_bundle(bundle, targets, demo=demo, missing=lacking)
    shows = None if targets and is_source(targets[0]) else demo
    source, *sinks = [*([demo_source(shows)] if shows else []), *(targets or [])]
    names = words.read(folder, shows=shows)
    if shows and pace.frames is None and pace.seconds is None:
        pace = replace(pace, frames=DEMO_FRAMES)
    checked = memory.checked(folder)
    with argument_errors_are_usage():
        settings = {**pace.settings(), **files.settings(), **vars(memory)}
        parts = StreamOptions(sinks=sinks, **settings).open(source, run.channel_order)
    if parts.takes_lanes:
        run = replace(run, num_lanes=lanes_for(MAX_LANES, run))
    with Engine(checked, run) as engine:
        words.give(engine, names)
        with engine.start_stream(parts) as labelled:
            _run(labelled, pace.frames, pace.seconds)
        _report(engine, labelled, files.json_file)


def _run(labelled: Stream, frames: int | None, seconds: float | None) -> None:
    """Label until it ends, by itself or otherwise; then finish the files."""
    timer = threading.Timer(seconds or 0.0, labelled.stop)
    timer.daemon = True
    with (
        stopped_by_signals(labelled.stop),
        terminal().status("waiting for the first frame") as status,
    ):
        if seconds is not None:
            timer.start()
        last_drawn, systemd = 0.0, Notifier()
        for seg in itertools.islice(labelled, frames):
            systemd.frame()
            if labelled.has_lost_its_sinks:
                break
            if time.monotonic() - last_drawn >= _REDRAW:
                last_drawn = time.monotonic()
                status.update(_status_line(seg, labelled))
        timer.cancel()
        status.update("finishing the files")
        labelled.close()


def _status_line(seg: Segmentation, labelled: Stream) -> str:
    stats = labelled.stats().values()
    given_out, dropped = sum(s.given_out for s in stats), sum(s.dropped for s in stats)
    classes = printable(", ".join(f"{s.name} {s.share:.0%}" for s in seg.present()[:3]))
    return f"{given_out} frames, {dropped} dropped; {classes}"


def _report(engine: Engine, labelled: Stream, json_file: Path | None) -> None:
    sources, sinks = labelled.stats(), labelled.sink_stats()
    if json_file is not None:
        content = {"engine": describe_engine(engine), "sources": sources, "sinks": sinks}
        write_json(json_file, content)
    for name, stats in sources.items():
        say(_source_line(name, stats))
    for sink in sinks:
        say(_sink_line(sink, len(sources)))
    failed = [s for s in sources.values() if s.error and (s.state == "ended" or not s.captured)]
    broken = [s for s in sinks if s.error]
    if failed or broken:
        raise SourceError(
            f"{len(failed)} of {len(sources)} sources and {len(broken)} of {len(sinks)} sinks "
            "failed; see above"
        )


def _sink_line(sink: SinkStats, num_sources: int) -> str:
    named = [f"{p} ({name})" if num_sources > 1 else p for p, name in sink.whose.items()]
    places = named or list(sink.files) or [sink.name]
    if len(places) > _MOST_PLACES:
        places[2:-2] = [f"... ({len(places) - 4} more)"]
    dropped = f", {sink.dropped} dropped" if sink.dropped else ""
    painted = ", painted on the GPU" if sink.painted == "gpu" else ""
    problem = f"; failed: {sink.error}" if sink.error else ""
    return f"{', '.join(places)}  {sink.written} frames{dropped}{painted}{problem}"


def _source_line(name: str, stats: SourceStats) -> str:
    state = "" if stats.state in ("running", "ended") else f"{stats.state}, "
    parts = [f"{name}  {state}{stats.labelled} of {stats.captured} frames labelled"]
    counts = {
        "reused": stats.reused,
        "dropped": stats.dropped,
        "damaged": stats.damaged,
        "reconnects": stats.reconnects,
        "times reopened, too far behind": stats.fell_behind,
    }
    parts += [f"{count} {what}" for what, count in counts.items() if count]
    if stats.fps:
        parts.append(f"{stats.fps:.{0 if stats.fps >= 10 else 1}f} fps")
    is_moved = stats.given_out > stats.labelled
    if is_moved:
        fps = f"{stats.given_out_fps:.{0 if stats.given_out_fps >= 10 else 1}f}"
        parts.append(f"{stats.given_out} given out with labels ({fps} fps)")
    ages = {"age": stats.age_ms} | ({"since labelled": stats.labelled_age_ms} if is_moved else {})
    for what, age_ms in ages.items():
        if age_ms and stats.live:
            shown = "/".join(f"{age_ms[p]:.0f}" for p in ("p50", "p95", "p99"))
            parts.append(f"{what} {shown} ms (p50/p95/p99)")
    if stats.error:
        parts.append(f"failed: {stats.error}")
    return ", ".join(parts)
