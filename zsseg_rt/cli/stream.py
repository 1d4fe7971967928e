"""``zsseg-rt stream`` and ``serve``: label cameras, videos and photos as they come."""

from __future__ import annotations

import getpass
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.options import (
    AlphaOption,
    BundleOption,
    DemoOption,
    JsonOption,
    WaitOption,
    WordOptions,
    choose_bundle,
    misuse,
    opt,
    takes_groups,
)
from zsseg_rt.cli.output import describe_engine, say, stopped_by_signals, terminal, write_json
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.common.schema import printable
from zsseg_rt.config import MAX_LANES, EngineConfig
from zsseg_rt.errors import SourceError
from zsseg_rt.server.settings import ServerSettings, is_local

if TYPE_CHECKING:
    from zsseg_rt.engine import Engine
    from zsseg_rt.results.segmentation import Segmentation
    from zsseg_rt.server import LiveServer
    from zsseg_rt.stream.runner import SourceStats, Stream
    from zsseg_rt.stream.sinks import SinkStats

DEMO_FRAMES = 300
_DEMO_RATE = 10  # frames per second that serve shows; the clip has no more
_LACKING = "name a source: a camera, video, folder or @FILE"
_REDRAW = 0.5  # seconds
_MOST_PLACES = 40  # that a report names of a sink
_EVERY = 1.0  # seconds between two words to systemd
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """Uses of past frames."""

    steady: bool = opt("Reduce flicker: blend scores along the motion.", False, "--steady")
    skip_still: bool = opt("Label still frames once, for up to 1 s.", False, "--skip-still")

    def check(self, bundle: Path) -> None:
        """Refuse a bundle whose frames have no memory, before anything is opened."""
        from zsseg_rt.bundles.bundle import Bundle
        from zsseg_rt.runtime.frame_memory import check_family

        if self.steady or self.skip_still:
            check_family(Bundle.load(bundle).family)


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """Settings of a stream."""

    policy: str | None = opt("latest (drops old frames) or all; default: latest for cameras.")
    follow: bool = opt("Move labels along to frames that are not labelled.", False, "--follow")
    every: int | None = opt("With --follow and policy all: label one of so many frames.")
    max_staleness: float | None = opt("Drop frames that waited longer than this many seconds.")
    alpha: AlphaOption = 0.5
    legend: bool = opt("Add colours, names and shares below overlays.", False, "--legend")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Which files it writes, and until when it labels."""

    rotate: str | None = opt("New files after 10min, at 500MB, or both.", metavar="TIME,SIZE")
    keep: str | None = opt("Remove old files: 7d, 20GB per source, or both.", metavar="TIME,SIZE")
    json_file: JsonOption = None
    frames: int | None = opt("Stop after this many frames; default with --demo: 300.", min=1)
    seconds: float | None = opt("Stop after this many seconds.", min=0.0)
    wait: WaitOption = False


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
    how: _Stream,
    limits: _Run,
    memory: _Memory,
    run: EngineConfig,
) -> None:
    """Label every frame of cameras, videos or photos, and write the results.

    A lost camera is reopened. Ctrl-C (SIGTERM, SIGHUP) ends the stream and finishes its
    files. docs/streams.md describes sources, sinks and policies.
    """
    from zsseg_rt.common.recordings import Rotation
    from zsseg_rt.engine import Engine
    from zsseg_rt.integrations.batch import lanes_for
    from zsseg_rt.stream.runner import StreamParts
    from zsseg_rt.stream.uris import is_source
    from zsseg_rt.stream.watch import Patience

    folder = choose_bundle(bundle, targets, demo=demo, missing=_LACKING)
    shows = None if targets and is_source(targets[0]) else demo
    source, *sinks = [*([_demo_source(shows)] if shows else []), *(targets or [])]
    names = words.read(folder, shows=shows)
    if shows and limits.frames is None and limits.seconds is None:
        limits = replace(limits, frames=DEMO_FRAMES)
    settings: dict[str, Any] = {**vars(how), **vars(memory), "sinks": sinks}
    with misuse():
        memory.check(folder)
        settings["rotation"] = Rotation.parse(limits.rotate, limits.keep)
        settings["patience"] = Patience(at_start=limits.wait)
        parts = StreamParts.open(source, run.channel_order, **settings)
    if parts.takes_lanes:
        run = replace(run, num_lanes=lanes_for(MAX_LANES, run))
    with Engine(folder, run) as engine:
        words.give(engine, names)
        with engine.start_stream(parts) as labelled:
            _run(labelled, limits.frames, limits.seconds)
        _report(engine, labelled, limits.json_file)


def _demo_source(demo: str | None, **settings: int) -> str:
    """The camera that shows a demo's clip or photos; None means the default one's."""
    from zsseg_rt.demo import DEFAULT

    parts = {} if demo in (None, DEFAULT) else {"demo": demo}
    query = "&".join(f"{key}={value}" for key, value in (parts | settings).items())
    return f"test://?{query}" if query else "test://"


def _run(labelled: Stream, frames: int | None, seconds: float | None) -> None:
    """Label until it ends, by itself or otherwise; then finish the files."""
    timer = threading.Timer(seconds or 0.0, labelled.stop)
    timer.daemon = True
    with stopped_by_signals(labelled.stop), terminal().status("waiting for a frame") as status:
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


class Notifier:
    """Sends systemd ``READY=1`` with the first frame, then ``WATCHDOG=1`` once a second."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        path = variables.get("NOTIFY_SOCKET", "")
        self._path = "\0" + path[1:] if path.startswith("@") else path
        self._last: float | None = None

    def frame(self) -> None:
        """A frame was labelled."""
        now = time.monotonic()
        if not self._path or (self._last is not None and now - self._last < _EVERY):
            return
        news = "WATCHDOG=1" if self._last is not None else "READY=1"
        self._last = now
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.sendto(news.encode(), self._path)
        except OSError as exc:
            _log.warning("NOTIFY_SOCKET: cannot report frames to systemd: %s", exc.strerror)
            self._path = ""


@dataclass(frozen=True, kw_only=True)
class _Sources:
    source: list[str] | None = opt("Camera, video, photos, or @FILE of them; may repeat.")
    once: bool = opt("Let a video file end; without this, it begins again.", False, "--once")
    policy: str = opt("latest (videos at their own speed) or all (every frame).", "latest")
    follow: bool | None = opt(
        "Move labels along to other frames; default: for cameras.", None, "--follow/--no-follow"
    )
    wait: WaitOption = False


@takes_groups
def serve(
    *,
    words_of_sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="Cameras, videos or photos, as --source."),
    ] = None,
    watched: _Sources,
    bundle: BundleOption = None,
    demo: DemoOption = None,
    access: ServerSettings,
    words: WordOptions,
    memory: _Memory,
    run: EngineConfig,
) -> None:
    """Show cameras, videos or photos with their labels in a browser.

    It prints the address to open. A video starts again at its end; a lost camera is
    reopened. Ctrl-C (or SIGTERM) stops it. docs/serve.md lists its other
    addresses, and how to reach it from elsewhere.
    """
    with needs_extra("serve", "to serve"):
        from zsseg_rt.server import LiveServer
        from zsseg_rt.server.settings import listen
    from zsseg_rt.engine import Engine
    from zsseg_rt.stream.runner import StreamParts

    named = [*(words_of_sources or []), *(watched.source or [])]
    path = choose_bundle(bundle, named, demo=demo, missing=_LACKING)
    sources = named or [_demo_source(demo, rate=_DEMO_RATE)]
    names = words.read(path, shows=None if named else demo)
    options: dict[str, Any] = {"policy": watched.policy, "follow": watched.follow, **vars(memory)}
    with misuse():  # before the engine takes its time
        memory.check(path)
        StreamParts.open(sources, run.channel_order, **options)
        listener = listen(access.host, access.port)
    with listener, Engine(path, run) as engine:
        words.give(engine, names)
        settings = replace(access, loop=not watched.once)
        options.update(listener=listener, wait=watched.wait)
        with LiveServer(engine, sources, settings, **options) as server:
            _tell(server)
            with stopped_by_signals(server.stop):
                server.wait()


def _tell(server: LiveServer) -> None:
    """Print where to look; a proxy or a service may wait for these lines."""
    typer.echo(f"Open {server.address}")
    if is_local(server.settings.host):
        typer.echo(f"From another computer: ssh -L {server.port}:{server.host}:{server.port} "
                   f"{_login()}, then open the same address there.")  # fmt: skip
    typer.echo("Ctrl-C stops it.")
    sys.stdout.flush()


def _login() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # nobody by that number
        user = "USER"
    return f"{user}@{socket.gethostname()}"
