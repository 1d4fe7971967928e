"""A stream's labels for browsers and programs: a page, a WebSocket and an HTTP interface.

Needs the extra ``serve``.
"""

from typing import TYPE_CHECKING, Any

from zsseg_rt.server.settings import Limits, ServerSettings

if TYPE_CHECKING:
    from zsseg_rt.server.live import LiveServer

__all__ = ["Limits", "LiveServer", "ServerSettings"]


def __getattr__(name: str) -> Any:
    """Loaded at first use: the command line reads the settings alone, without the extra."""
    if name != "LiveServer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zsseg_rt.server.live import LiveServer

    return LiveServer
