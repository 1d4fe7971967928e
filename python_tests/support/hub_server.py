"""A server that speaks the Hugging Face Hub's protocol as far as downloads use it."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The server's files, its misbehaviour, and the requests that came."""

    endpoint: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)  # as of a server that is no hub
    served: dict[str, bytes] = field(default_factory=dict)  # where it is not what was announced
    encoding: str = ""  # what it says content is packed by
    status: int = 0  # of every answer
    body_status: int = 0  # of those with content
    cut_after: list[int] = field(default_factory=list)  # bytes, of the next connections
    pause: float = 0.0  # seconds before each part
    part: int = 1 << 16
    ignores_ranges: bool = False
    is_no_hub: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    logins: list[str | None] = field(default_factory=list)

    def ranges(self) -> list[str | None]:
        return [wanted for _, path, wanted in self.requests if path.startswith("/cdn/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        hub = self.hub
        if self.path.startswith("/api/"):  # the library's own statistics
            self._end(404)
            return
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        hub.logins.append(self.headers.get("Authorization"))
        if hub.status:
            self._end(hub.status)
        elif hub.is_no_hub:
            self._end(200, {"Content-Type": "text/html"})
        elif self.path in hub.plain and self.command == "GET":
            self._send(hub.plain[self.path])
        elif self.path in hub.plain:
            self._end(200, {"Content-Length": str(len(hub.plain[self.path])), "ETag": '"one"'})
        elif self.path.startswith("/cdn/"):
            key = self.path.removeprefix("/cdn/")
            self._send(hub.served.get(key, hub.files[key]))
        else:
            self._redirect()

    do_HEAD = do_GET = _answer  # noqa: N815

    def _redirect(self) -> None:
        owner, name, _, _, file = self.path.strip("/").split("/")
        key = f"{owner}/{name}/{file}"
        if key not in self.hub.files:
            self._end(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = self.hub.files[key]
        port = self.server.server_address[1]
        self._end(
            302,
            {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
                "ETag": '"of-the-redirect"',
                "Location": f"http://localhost:{port}/cdn/{key}",
            },
        )

    def _send(self, data: bytes) -> None:
        hub = self.hub
        if hub.body_status:
            self._end(hub.body_status)
            return
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if hub.ignores_ranges:
            start = 0
        headers = {"Content-Length": str(len(data) - start)}
        if hub.encoding:
            headers["Content-Encoding"] = hub.encoding
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._end(206 if start else 200, headers, finish=False)
        end = start + hub.cut_after.pop(0) if hub.cut_after else len(data)
        with suppress(OSError):
            for at in range(start, min(end, len(data)), hub.part):
                time.sleep(hub.pause)
                self.wfile.write(data[at : min(at + hub.part, end)])
        self.close_connection = end < len(data)

    def _end(self, status: int, headers: dict[str, str] | None = None, finish: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if finish and "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
