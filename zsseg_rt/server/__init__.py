"""A stream's labels for browsers and programs: a page, a WebSocket and an HTTP interface.

The stream is labelled in a thread of its own (``live``); requests are answered in another, by one
asyncio loop (``api``, ``viewer``). Between them stands ``hub``, which keeps the newest frame of
each source and nothing older. Needs the extra ``serve``.
"""

from zsseg_rt.server.live import LiveServer
from zsseg_rt.server.settings import Limits, ServerSettings

__all__ = ["Limits", "LiveServer", "ServerSettings"]
