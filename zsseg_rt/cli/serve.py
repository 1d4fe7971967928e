"""``zsseg-rt serve``: label cameras, videos and photos, and show them in browsers."""

from __future__ import annotations

import getpass
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.options import (
    BackendOption,
    BackgroundOption,
    BundleOption,
    ClassesOption,
    ClassOption,
    CosineOption,
    DeviceOption,
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
from zsseg_rt.cli.remarks import print_background
from zsseg_rt.cli.service import stopped_by_signals
from zsseg_rt.cli.stream import DEMO_SOURCE
from zsseg_rt.config import EngineConfig
from zsseg_rt.extras import needs_extra

if TYPE_CHECKING:
    from zsseg_rt.server import LiveServer


NEW_TOKEN = "new"


def serve(
    source: Annotated[
        list[str] | None,
        typer.Option(help="A camera, video or photos, or @FILE with one per line; may repeat."),
    ] = None,
    bundle: BundleOption = None,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="Show test:// with the bundle that ships with the package."),
    ] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="ZSSEG_TOKEN", help="Token that clients must send; 'new' makes one."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name of the server, such as a proxy's; may repeat."),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address or network of a proxy with many clients; may repeat."),
    ] = None,
    stale_after: Annotated[
        float, typer.Option(help="Seconds without a new frame after which /healthz answers 503.")
    ] = 5.0,
    classes: ClassesOption = None,
    class_name: ClassOption = None,
    background: BackgroundOption = "",
    template: TemplateOption = None,
    policy: Annotated[
        str, typer.Option(help="latest (videos at their own speed) or all (every frame).")
    ] = "latest",
    steady: SteadyOption = False,
    skip_still: SkipStillOption = False,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = 0,
    unknown_below: UnknownBelowOption = None,
    min_region_score: MinRegionScoreOption = None,
    cosine: CosineOption = None,
) -> None:
    """Show cameras, videos or photos with their labels in a browser.

    It prints the address to open. A camera that is lost is opened again. Ctrl-C (or SIGTERM) stops
    it. docs/serve.md tells what else it answers, and how to reach it from elsewhere.
    """
    with needs_extra("serve", "to serve"):
        from zsseg_rt.server import LiveServer, ServerSettings
        from zsseg_rt.server.settings import listen
    from zsseg_rt.engine import Engine
    from zsseg_rt.stream.runner import check_settings
    from zsseg_rt.stream.uris import open_sources

    chosen, sources = _choose_inputs(bundle, source or [], demo=demo)
    names = read_classes_or_demo(classes, class_name or [], demo=demo)
    config = EngineConfig(
        device=device,
        backend=backend,
        precision=precision,
        num_threads=threads,
        unknown_below=unknown_below,
        min_region_score=min_region_score,
        **read_cosine(cosine),
    )
    with argument_errors_are_usage():
        check_settings(policy, None)
        open_sources(sources)  # read only, before the engine takes its time
        settings = ServerSettings(
            host=host,
            port=port,
            token=_token(token),
            allowed_hosts=tuple(allow_host or ()),
            proxies=tuple(proxy or ()),
            stale_seconds=stale_after,
        )
        listener = listen(host, port)
    options: dict[str, Any] = {"policy": policy, "listener": listener}
    options |= {"steady": steady, "skip_still": skip_still}
    checked = bundle_with_memory(chosen) if steady or skip_still else chosen
    with listener, Engine(checked, config) as engine:
        rivals = read_background(background, len(names))
        engine.set_classes(names, background=rivals, templates=template)
        print_background(engine, background)
        with LiveServer(engine, sources, settings, **options) as server:
            _tell(server)
            with stopped_by_signals(server.stop):
                server.wait()


def _choose_inputs(
    bundle: Path | None, sources: list[str], *, demo: bool
) -> tuple[Path, list[str]]:
    """The bundle and the sources.

    Raises:
        UsageError: Something is missing.
    """
    if demo:
        from zsseg_rt.demo import demo_bundle

        return bundle or demo_bundle(), sources or [DEMO_SOURCE]
    if not sources:
        raise UsageError("name a source: --source with a camera, video or @FILE; or try --demo")
    if bundle is None:
        raise UsageError(
            "name a bundle: --bundle NAME.zsseg (zsseg-rt fetch gets one); or try --demo"
        )
    return bundle, sources


def _token(given: str | None) -> str | None:
    return secrets.token_urlsafe(24) if given == NEW_TOKEN else given or None


def _tell(server: LiveServer) -> None:
    """Print where to look; a proxy or a service may wait for these lines."""
    typer.echo(f"Open {server.address}")
    if server.is_local:
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
