"""A server that speaks the Hugging Face Hub's protocol as far as downloads use it."""

import hashlib
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
    ignores_ranges: bool = False
    is_no_hub: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    logins: list[str | None] = field(default_factory=list)

    def ranges(self):
        return [wanted for _, path, wanted in self.requests if path.startswith("/cdn/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, path, wanted = self.hub, self.path, self.headers.get("Range")
        if path.startswith("/api/"):  # the library's own statistics
            self._end(404)
            return
        hub.requests.append((self.command, path, wanted))
        hub.logins.append(self.headers.get("Authorization"))
        owner, name, *_, file = f"/{path}".strip("/").split("/")
        key = path.removeprefix("/cdn/") if path.startswith("/cdn/") else f"{owner}/{name}/{file}"
        if hub.status:
            self._end(hub.status)
        elif hub.is_no_hub:
            self._end(200, {"Content-Type": "text/html"})
        elif path in hub.plain and self.command == "HEAD":
            self._end(200, {"Content-Length": str(len(hub.plain[path])), "ETag": '"one"'})
        elif path in hub.plain:
            self._send(hub.plain[path], wanted)
        elif path.startswith("/cdn/"):
            self._send(hub.served.get(key, hub.files[key]), wanted)
        elif data := hub.files.get(key):
            headers = {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
            elsewhere = hub.endpoint.replace("127.0.0.1", "localhost")
            headers |= {"X-Linked-Size": str(len(data)), "Location": f"{elsewhere}/cdn/{key}"}
            self._end(302, {"X-Repo-Commit": COMMIT, "ETag": '"of-the-redirect"', **headers})
        else:
            self._end(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815

    def _send(self, data, wanted):
        hub = self.hub
        if hub.body_status:
            self._end(hub.body_status)
            return
        resumes = wanted and not hub.ignores_ranges
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if resumes else 0
        headers = {"Content-Length": str(len(data) - start)}
        if hub.encoding:
            headers["Content-Encoding"] = hub.encoding
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._end(206 if start else 200, headers)
        end = start + hub.cut_after.pop(0) if hub.cut_after else len(data)
        with suppress(OSError):
            for at in range(start, min(end, len(data)), 1 << 16):
                time.sleep(hub.pause)
                self.wfile.write(data[at : min(at + (1 << 16), end)])
        self.close_connection = end < len(data)

    def _end(self, status, headers=()):
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve_hub():
    hub = Hub()
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})
    ) as server:
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield hub
        server.shutdown()
