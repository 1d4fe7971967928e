"""A slow link in front of a server: a TCP proxy with a rate and a buffer, as a modem has."""

import asyncio
import contextlib
import socket
import threading
from collections import deque

_CHUNK = 4096


class SlowLink:
    """Passes connections on; what the server sends arrives at a limited rate, through a buffer.

    Use it as a context manager. ``port`` is where clients connect, on 127.0.0.1. What clients send
    is passed on at once.

    Args:
        server_port: The server's port on 127.0.0.1.
        bytes_per_second: Rate from the server to a client, per connection.
        buffer_bytes: What the link holds on the way. Beyond it, the server has to wait.
    """

    def __init__(self, server_port, *, bytes_per_second, buffer_bytes):
        self._server_port, self._rate, self._buffer = server_port, bytes_per_second, buffer_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="slow link", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20.0)
        self._listener.close()

    def _run(self):
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._pass_on, sock=self._listener))
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _pass_on(self, from_client, to_client):
        from_server, to_server = await self._connect()
        works = (
            _copy(from_client, to_server),
            _Wire(from_server, to_client, self._rate, self._buffer).run(),
        )
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            to_client.close()
            to_server.close()

    async def _connect(self):
        up = socket.socket()
        up.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _CHUNK)  # or the kernel holds megabytes
        up.setblocking(False)
        await self._loop.sock_connect(up, ("127.0.0.1", self._server_port))
        return await asyncio.open_connection(sock=up, limit=_CHUNK)


class _Wire:
    """One direction of one connection."""

    def __init__(self, reader, writer, rate, size):
        self._reader, self._writer, self._rate, self._size = reader, writer, rate, size
        self._held, self._waiting = 0, deque()
        self._changed = asyncio.Condition()

    async def run(self):
        await asyncio.gather(self._fill(), self._drain())

    async def _fill(self):
        while True:
            data = await self._reader.read(_CHUNK)
            async with self._changed:
                await self._changed.wait_for(lambda: self._held < self._size)
                self._waiting.append(data)
                self._held += len(data)
                self._changed.notify_all()
            if not data:
                return

    async def _drain(self):
        loop = asyncio.get_running_loop()
        free_at = loop.time()
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._waiting)
                data = self._waiting.popleft()
                self._held -= len(data)
                self._changed.notify_all()
            if not data:
                return
            free_at = max(free_at, loop.time()) + len(data) / self._rate
            await asyncio.sleep(free_at - loop.time())
            with contextlib.suppress(ConnectionError):
                self._writer.write(data)
                await self._writer.drain()


async def _copy(reader, writer):
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
