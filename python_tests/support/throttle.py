"""A slow link in front of a server: a TCP proxy with a rate and a buffer, as a modem has."""

import contextlib
import queue
import socket
import socketserver
import threading
import time

_CHUNK = 4096


class SlowLink(socketserver.ThreadingTCPServer):
    """Clients connect to its ``port``; what the server sends comes late, what they send at once."""

    daemon_threads = True

    def __init__(self, server_port, *, bytes_per_second, buffer_bytes):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.port, self.server_port = self.server_address[1], server_port
        self.rate, self.chunks = bytes_per_second, buffer_bytes // _CHUNK
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class _Connection(socketserver.BaseRequestHandler):
    def handle(self):
        server, buffer = socket.socket(), queue.Queue(self.server.chunks)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _CHUNK)  # not megabytes
        server.connect(("127.0.0.1", self.server.server_port))
        for source, put in ((self.request, server.sendall), (server, buffer.put)):
            threading.Thread(target=_pass_on, args=(source, put, server), daemon=True).start()
        with contextlib.suppress(OSError):  # the client is gone
            while data := buffer.get():
                time.sleep(len(data) / self.server.rate)
                self.request.sendall(data)


def _pass_on(source, put, server):
    with contextlib.suppress(OSError):  # the connection is closed
        try:
            while data := source.recv(_CHUNK):
                put(data)
        finally:
            put(b"")
            server.shutdown(socket.SHUT_RDWR)
