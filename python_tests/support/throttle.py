"""A slow link in front of a server: a TCP proxy with a rate and a buffer, as a modem has."""

import contextlib
import queue
import socket
import threading
import time

_CHUNK = 4096


class SlowLink:
    """Passes connections on; what the server sends arrives at a limited rate, through a buffer.

    Use it as a context manager. ``port`` is where clients connect, on 127.0.0.1. What clients send
    is passed on at once.
    """

    def __init__(self, server_port, *, bytes_per_second, buffer_bytes):
        self._server_port, self._rate, self._buffer = server_port, bytes_per_second, buffer_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]

    def __enter__(self):
        _run(self._accept)
        return self

    def __exit__(self, *exception):
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self):
        while True:
            client, _ = self._listener.accept()
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _CHUNK)  # not megabytes
            server.connect(("127.0.0.1", self._server_port))
            self._sockets += [client, server]
            buffer = queue.Queue(max(self._buffer // _CHUNK, 1))
            _run(_pass_on, client, server)
            _run(_keep, server, buffer)
            _run(self._drain, buffer, client)

    def _drain(self, buffer, client):
        free_at = time.monotonic()
        while data := buffer.get():
            free_at = max(free_at, time.monotonic()) + len(data) / self._rate
            time.sleep(max(free_at - time.monotonic(), 0.0))
            client.sendall(data)
        client.shutdown(socket.SHUT_RDWR)


def _pass_on(client, server):
    try:
        while data := client.recv(_CHUNK):
            server.sendall(data)
    finally:
        server.shutdown(socket.SHUT_RDWR)


def _keep(server, buffer):
    while data := server.recv(_CHUNK):
        buffer.put(data)
    buffer.put(b"")


def _run(work, *arguments):
    def quietly():
        with contextlib.suppress(OSError):  # the connection is closed
            work(*arguments)

    threading.Thread(target=quietly, daemon=True).start()
