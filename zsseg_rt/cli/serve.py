"""``zsseg-rt serve``: label cameras, videos and photos, and show them in browsers."""

from __future__ import annotations

import getpass
import socket
import sys
from dataclasses import dataclass, replace
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
from zsseg_rt.cli.options import BundleOption, DemoOption, WaitOption, argument_errors_are_usage
from zsseg_rt.cli.service import stopped_by_signals
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.config import EngineConfig
from zsseg_rt.server.settings import ServerSettings

if TYPE_CHECKING:
    from zsseg_rt.server import LiveServer


_DEMO_RATE = 10  # frames per second; the clip has no more


@dataclass(frozen=True, kw_only=True)
class _Sources:
    source: list[str] | None = opt(
        "A camera, video or photos, or @FILE with one per line; may repeat."
    )
    once: bool = opt("Let a video file end; without this, it begins again.", False, "--once")
    policy: str = opt("latest (videos at their own speed) or all (every frame).", "latest")
    follow: bool | None = opt(
        "Move labels along the motion to frames that the network does not label; default: for "
        "cameras.",
        None,
        "--follow/--no-follow",
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
    memory: MemoryOptions,
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
    from zsseg_rt.stream.opening import StreamOptions

    lacking = "name a source: a camera, video, folder or @FILE"
    named = [*(words_of_sources or []), *(watched.source or [])]
    path = choose_bundle(bundle, named, demo=demo, missing=lacking)
    sources = named or [demo_source(demo, rate=_DEMO_RATE)]
    names = words.read(path, shows=None if named else demo)
    with argument_errors_are_usage():
        options: dict[str, Any] = {
            "policy": watched.policy,
            "follow": watched.follow,
            **vars(memory),
        }
        # Sources are read only, before the engine takes its time.
        StreamOptions(**options).open(sources, run.channel_order)
        listener = listen(access.host, access.port)
    with listener, Engine(memory.checked(path), run) as engine:
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
