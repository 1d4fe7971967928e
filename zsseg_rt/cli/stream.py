"""``zsseg-rt stream``: label cameras, videos and photos as they come."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.options import (
    AlphaOption,
    BackendOption,
    BackgroundOption,
    BundleOption,
    ClassesOption,
    ClassOption,
    CosineOption,
    DeviceOption,
    JsonOption,
    MinRegionScoreOption,
    PrecisionOption,
    SkipStillOption,
    SteadyOption,
    TemplateOption,
    ThreadsOption,
    UnknownBelowOption,
    UsageError,
    argument_errors_are_usage,
    bundle_with_memory,
    read_background,
    read_classes_or_demo,
    read_cosine,
)
from zsseg_rt.cli.output import describe_engine, terminal, write_json
from zsseg_rt.cli.remarks import print_background
from zsseg_rt.cli.service import Notifier, stopped_by_signals
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import SourceError

if TYPE_CHECKING:
    from zsseg_rt.engine import Engine
    from zsseg_rt.result import Segmentation
    from zsseg_rt.stream.runner import SourceStats, Stream
    from zsseg_rt.stream.sinks import SinkStats

DEMO_SOURCE = "test://"
DEMO_FRAMES = 300
_REDRAW = 0.5  # seconds
_MOST_PLACES = 40  # that a report names of a sink


def stream(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE [SINK]...",
            help="A camera, video or photos, @FILE with one per line; then NAME.mp4, NAME.jsonl, "
            "NAME/ for label images, rtsp://@:PORT/NAME to be watched. With --demo, sinks only.",
        ),
    ] = None,
    bundle: BundleOption = None,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Stream test:// with the bundle that ships with the package."),
    ] = False,
    classes: ClassesOption = None,
    class_name: ClassOption = None,
    background: BackgroundOption = "",
    template: TemplateOption = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many frames; default with --demo: 300."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after this many seconds.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="latest (drop old frames) or all (the source waits); default: latest for "
            "cameras, else all."
        ),
    ] = None,
    max_staleness: Annotated[
        float | None, typer.Option(help="Drop frames that waited longer than this many seconds.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for cameras that are off at the start.")
    ] = False,
    rotate: Annotated[
        str | None,
        typer.Option(
            metavar="TIME,SIZE",
            help="Begin new files after 10min, at 500MB, or whichever comes first: 10min,500MB.",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="TIME,SIZE",
            help="With --rotate: remove old files after 7d, beyond 20GB per source, or both.",
        ),
    ] = None,
    steady: SteadyOption = False,
    skip_still: SkipStillOption = False,
    alpha: AlphaOption = 0.5,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = 0,
    unknown_below: UnknownBelowOption = None,
    min_region_score: MinRegionScoreOption = None,
    cosine: CosineOption = None,
    json_file: JsonOption = None,
) -> None:
    """Label every frame of cameras, videos or photos, and write the results.

    A camera that is lost is opened again. Ctrl-C (SIGTERM, SIGHUP) ends the stream and finishes its
    files. docs/streams.md tells sources, sinks and policies.
    """
    from zsseg_rt.batch.photo_run import lanes_for
    from zsseg_rt.config import MAX_LANES
    from zsseg_rt.engine import Engine
    from zsseg_rt.files.series import Rotation
    from zsseg_rt.steady.memory import source_memories
    from zsseg_rt.stream.runner import waits_for_labels
    from zsseg_rt.stream.sinks import open_writers
    from zsseg_rt.stream.uris import open_sources

    chosen, source, sinks = _choose_inputs(bundle, targets or [], demo=demo)
    names = read_classes_or_demo(classes, class_name or [], demo=demo)
    if demo and frames is None and seconds is None:
        frames = DEMO_FRAMES
    config = EngineConfig(
        device=device,
        backend=backend,
        precision=precision,
        num_threads=threads,
        unknown_below=unknown_below,
        min_region_score=min_region_score,
        **read_cosine(cosine),
    )
    checked = bundle_with_memory(chosen) if steady or skip_still else chosen
    with argument_errors_are_usage():
        settings = _stream_settings(policy, max_staleness, wait=wait)
        sources = open_sources(source, config.channel_order)
        if waits_for_labels(sources, settings["policy"]) and not (steady or skip_still):
            config = replace(config, num_lanes=lanes_for(MAX_LANES, config))
        settings["memories"] = source_memories(sources, steady=steady, skip_still=skip_still)
        writers = open_writers(
            sinks,
            channel_order=config.channel_order,
            alpha=alpha,
            sources=[one.name for one in sources],
            rotation=Rotation.parse(rotate, keep),
        )
    with Engine(checked, config) as engine:
        chosen_background = read_background(background, len(names))
        engine.set_classes(names, background=chosen_background, templates=template)
        print_background(engine, background)
        with _open(sources, engine, writers=writers, **settings) as labelled:
            _run(labelled, frames, seconds)
        _report(engine, labelled, json_file)


def _choose_inputs(
    bundle: Path | None, targets: list[str], *, demo: bool
) -> tuple[Path, str, list[str]]:
    """The bundle, the source and the sinks.

    Raises:
        UsageError: Something is missing.
    """
    if demo:
        from zsseg_rt.demo import demo_bundle

        return bundle or demo_bundle(), DEMO_SOURCE, targets
    if not targets:
        raise UsageError("name a source: a camera, video, folder or @FILE; or try --demo")
    if bundle is None:
        raise UsageError(
            "name a bundle: --bundle NAME.zsseg (zsseg-rt fetch gets one); or try --demo"
        )
    return bundle, targets[0], targets[1:]


def _stream_settings(
    policy: str | None, max_staleness: float | None, *, wait: bool
) -> dict[str, Any]:
    from zsseg_rt.stream.runner import check_settings
    from zsseg_rt.stream.watch import Patience

    check_settings(policy, max_staleness)
    patience = Patience(at_start=wait)
    return {"policy": policy, "max_staleness": max_staleness, "patience": patience}


def _open(sources: Sequence[Any], engine: Engine, **settings: Any) -> Stream:
    from zsseg_rt.lane_pool import LanePool
    from zsseg_rt.stream.runner import Stream

    lanes = None
    if engine.config.num_lanes > 1:
        lanes = LanePool(engine.segment, engine.lane, engine.config.num_lanes)
    return Stream(sources, engine.segment, lanes=lanes, **settings)


def _run(labelled: Stream, frames: int | None, seconds: float | None) -> None:
    """Label until it ends, by itself or otherwise; then finish the files."""
    with (
        stopped_by_signals(labelled.stop),
        _stopped_after(seconds, labelled.stop),
        terminal().status("waiting for the first frame") as status,
    ):
        last_drawn, systemd = 0.0, Notifier()
        for seg in itertools.islice(labelled, frames):
            systemd.frame()
            if labelled.has_lost_its_sinks:
                break
            if time.monotonic() - last_drawn >= _REDRAW:
                last_drawn = time.monotonic()
                status.update(_status_line(seg, labelled))
        status.update("finishing the files")
        labelled.close()


@contextmanager
def _stopped_after(seconds: float | None, stop: Callable[[], None]) -> Iterator[None]:
    timer = None if seconds is None else threading.Timer(seconds, stop)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _status_line(seg: Segmentation, labelled: Stream) -> str:
    stats = labelled.stats().values()
    labelled_so_far, dropped = sum(s.labelled for s in stats), sum(s.dropped for s in stats)
    classes = ", ".join(f"{s.name} {s.share:.0%}" for s in seg.present()[:3])
    return f"{labelled_so_far} frames, {dropped} dropped; {classes}"


def _report(engine: Engine, labelled: Stream, json_file: Path | None) -> None:
    """Print and write how sources and sinks did.

    Raises:
        SourceError: One of them failed.
    """
    sources, sinks = labelled.stats(), labelled.sink_stats()
    if json_file is not None:
        content = {"engine": describe_engine(engine), "sources": sources, "sinks": sinks}
        write_json(json_file, content)
    console = terminal()
    for name, stats in sources.items():
        console.print(_source_line(name, stats), highlight=False, soft_wrap=True)
    for sink in sinks:
        console.print(_sink_line(sink, len(sources)), highlight=False, soft_wrap=True)
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
    problem = f"; failed: {sink.error}" if sink.error else ""
    return f"{', '.join(places)}  {sink.written} frames{dropped}{problem}"


def _source_line(name: str, stats: SourceStats) -> str:
    state = "" if stats.state in ("running", "ended") else f"{stats.state}, "
    parts = [f"{name}  {state}{stats.labelled} of {stats.captured} frames labelled"]
    counts = {
        "reused": stats.reused,
        "dropped": stats.dropped,
        "damaged": stats.damaged,
        "reconnects": stats.reconnects,
        "times opened anew, too far behind": stats.fell_behind,
    }
    parts += [f"{count} {what}" for what, count in counts.items() if count]
    if stats.age_ms:
        ages = "/".join(f"{stats.age_ms[p]:.0f}" for p in ("p50", "p95", "p99"))
        parts.append(f"age {ages} ms (p50/p95/p99)")
    if stats.error:
        parts.append(f"failed: {stats.error}")
    return ", ".join(parts)
