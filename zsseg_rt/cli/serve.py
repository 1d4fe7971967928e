"""``zsseg-rt serve``: label cameras, videos and photos, and show them in browsers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zsseg_rt.cli.extras import needs_extra
from zsseg_rt.cli.options import (
    BackendOption,
    BackgroundOption,
    BundleOption,
    ClassesOption,
    ClassOption,
    DeviceOption,
    MinRegionScoreOption,
    PrecisionOption,
    TemplateOption,
    ThreadsOption,
    UnknownBelowOption,
    UsageError,
    argument_errors_are_usage,
    read_classes_or_demo,
    split,
)
from zsseg_rt.cli.signals import stopped_by_signals
from zsseg_rt.cli.stream import DEMO_SOURCE
from zsseg_rt.config import EngineConfig


def serve(
    source: Annotated[
        list[str] | None,
        typer.Option(help="A camera, video or photos, or @FILE with one per line; may repeat."),
    ] = None,
    bundle: BundleOption = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Show test:// through the bundle that ships.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    classes: ClassesOption = None,
    class_name: ClassOption = None,
    background: BackgroundOption = "",
    template: TemplateOption = None,
    policy: Annotated[str, typer.Option(help="latest or all; see zsseg-rt stream.")] = "latest",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = 0,
    unknown_below: UnknownBelowOption = None,
    min_region_score: MinRegionScoreOption = None,
) -> None:
    """Show cameras, videos or photos with their labels in a browser."""
    with needs_extra("serve", "to serve"):
        from zsseg_rt.server import LiveServer, ServerSettings
    from zsseg_rt.engine import Engine
    from zsseg_rt.stream.uris import open_sources

    chosen, uris = _choose_inputs(bundle, source or [], demo=demo)
    names = read_classes_or_demo(classes, class_name or [], demo=demo)
    config = EngineConfig(
        device=device,
        backend=backend,
        precision=precision,
        num_threads=threads,
        unknown_below=unknown_below,
        min_region_score=min_region_score,
    )
    with argument_errors_are_usage():
        sources = open_sources(uris, config.channel_order)
        settings = ServerSettings(host=host, port=port)
    with Engine(chosen, config) as engine:
        engine.set_classes(names, background=split(background), templates=template)
        with LiveServer(engine, sources, settings, policy=policy) as server:
            typer.echo(f"Open {server.url}")
            with stopped_by_signals(server.stop):
                server.wait()


def _choose_inputs(
    bundle: Path | None, sources: list[str], *, demo: bool
) -> tuple[Path, list[str]]:
    if demo:
        from zsseg_rt.demo import demo_bundle

        return bundle or demo_bundle(), sources or [DEMO_SOURCE]
    if not sources:
        raise UsageError("name a source: --source with a camera, video or @FILE; or try --demo")
    if bundle is None:
        raise UsageError("name a bundle: --bundle NAME.zsseg; or try --demo")
    return bundle, sources
