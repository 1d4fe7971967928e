"""A browser that looks at the server's page, and a server that does what real ones seldom do."""

import base64
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from support.required import without_streams
from zsseg_rt import Frame, Segmentation
from zsseg_rt.results.visualize import palette

PATIENCE = 30_000  # ms that anything may take on a busy machine

# Left in window.refused: what the page's Content-Security-Policy did not let it do.
_WATCH = """
window.refused = [];
addEventListener("securitypolicyviolation", (event) => {
  refused.push(`${event.violatedDirective}: ${event.blockedURI}`);
});
"""
# Colours of the canvas, [r, g, b] a pixel, row by row.
_PIXELS = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return btoa(Array.from(data, (value) => String.fromCharCode(value)).join(""));
}"""


@contextmanager
def open_browser() -> Iterator[object]:
    """Chromium without a window; skips the test where Playwright or Chromium is absent."""
    try:
        import axe_playwright_python  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError as exc:
        without_streams(f"the page's tests need playwright, axe-playwright-python, serve: {exc}")
    program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if program is None:
        without_streams("the page's tests need: apt install chromium-headless-shell")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def expect(locator):
    from playwright import sync_api

    sync_api.expect.set_options(timeout=PATIENCE)
    return sync_api.expect(locator)


@contextmanager
def open_page(browser, *, size=(1280, 800), **settings) -> Iterator[object]:
    """A page in a context of its own; at the end, nothing in it may have failed or been refused."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **settings)
    context.set_default_timeout(PATIENCE)
    context.add_init_script(_WATCH)
    page, failures = context.new_page(), []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on(
        "console", lambda message: failures.append(message.text) if _is_failure(message) else None
    )
    yield page
    refused = page.evaluate("window.refused ?? []")
    context.close()
    assert failures == []
    assert refused == []


def _is_failure(message) -> bool:
    """Chromium itself reports addresses that do not answer; tests stop servers on purpose."""
    return message.type in ("error", "warning") and not re.search(
        r"net::ERR_|WebSocket connection to|Failed to load resource|willReadFrequently",
        message.text,
    )


def canvas_pixels(page) -> np.ndarray:
    """The canvas as drawn, uint8 [H, W, 3]."""
    canvas = page.locator("#picture")
    width, height = canvas.evaluate("(canvas) => [canvas.width, canvas.height]")
    pixels = np.frombuffer(base64.b64decode(canvas.evaluate(_PIXELS)), np.uint8)
    return pixels.reshape(height, width, 4)[..., :3]


def class_colours(*names: str) -> list[tuple[int, ...]]:
    return [tuple(colour) for colour in palette(names).tolist()]


def legend_names(page) -> list[str]:
    return page.locator("#classes .name bdi").all_inner_texts()


def accessibility_faults(page) -> str:
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page)
    return results.generate_report() if results.violations_count else ""


class ScriptedServer:
    """Answers a page out of memory; the test decides what is sent and when.

    Its address is not a secure one, as that of a camera's computer in a local network is not:
    browsers withhold some functions there.
    """

    URL = "http://camera.test/"

    def __init__(self, page, names=("road", "sky"), *, token: str = "") -> None:
        self.page, self.token = page, token
        self.version, self.names = 1, [[n] if isinstance(n, str) else list(n) for n in names]
        self.background, self.auto_background, self.unknown_below = [], False, 0.0
        self.known_names: list[str] = []
        self.known_words: list[str] = []
        self.remarks: list[str] = []
        self.sources = [source("camera", "running")]
        self.refuse_with: tuple[int, str] | None = None
        self.unknown: list[str] = []
        self.refuse_images_with: int | None = None
        self.images: list[bytes] = []
        self.close_with: int | None = None
        self.is_mute = False
        self.socket, self.received, self.bodies, self.frames = None, [], [], 0
        page.route(self.URL + "**", self._answer)
        page.route_web_socket(self.URL.replace("http", "ws") + "v1/live", self._accept)

    def open(self):
        self.page.goto(self.URL)
        self.wait_for(lambda: self.socket is not None)
        return self

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + PATIENCE / 1000
        while not condition():
            assert time.monotonic() < deadline, self.received
            self.page.wait_for_timeout(20)

    def taken(self, kind: str) -> list[dict]:
        return [message for message in self.received if message["type"] == kind]

    def vocabulary(self) -> dict:
        colours = palette([group[0] for group in self.names]).tolist()
        classes = [
            {"name": group[0], "synonyms": group[1:], "colour": colours[label]}
            for label, group in enumerate(self.names)
        ]
        return {
            "version": self.version,
            "classes": classes,
            "background": self.background,
            "auto_background": self.auto_background,
            "remarks": self.remarks,
            "unknown_label": 255 if len(classes) <= 254 else 65535,
            "unknown_below": self.unknown_below,
        }

    def say(self, kind: str, **content) -> None:
        self.socket.send(json.dumps({"type": kind, **content}))

    def say_vocabulary(self) -> None:
        self.say("vocabulary", **self.vocabulary())

    def say_state(self, *sources: dict, rate: float = 12.0, given_out_rate: float = 12.0) -> None:
        self.sources = list(sources)
        rates = {"rate": rate, "given_out_rate": given_out_rate}
        self.say("state", sources=self.sources, viewers=1, **rates)

    def change(self, *names) -> None:
        """New classes, as if another viewer had asked for them."""
        self.version, self.names = self.version + 1, [[name] for name in names]
        self.say_vocabulary()

    def send_frame(self, labels: np.ndarray, *, age_ms: float = 0.0, **header) -> None:
        """Send a grey picture twice as wide and high as its labels, and wait until it was drawn."""
        frame = self.frame(labels, age_ms=age_ms, **header)
        self.socket.send(frame)
        self.wait_for(lambda: any(ack["id"] == self.frames for ack in self.taken("ack")))

    def frame(self, labels: np.ndarray, *, age_ms: float = 0.0, **header) -> bytes:
        """A message as the real server packs it; ``header`` replaces some of its entries."""
        from zsseg_rt.server.hub import encode_message

        self.frames += 1
        now, whole = time.monotonic(), labels.repeat(2, axis=0).repeat(2, axis=1)
        frame = Frame(
            source=self.sources[0]["name"], index=self.frames, captured_at=now - age_ms / 1000.0,
            clock="driver", image=np.full((*whole.shape, 3), 128, np.uint8),
        )  # fmt: skip
        names = tuple(group[0] for group in self.names)
        seg = Segmentation(labels=whole, names=names, vocabulary_version=self.version, frame=frame)
        message = encode_message(self.frames, seg, "rgb")
        message.header.update(header)
        return message.pack(1000.0 * now)

    def _accept(self, socket) -> None:
        wanted = ["zsseg.v1", *([f"token.{self.token}"] if self.token else [])]
        code = self.close_with if self.close_with is not None else 4401
        if self.close_with is not None or socket.protocols != wanted:
            socket.close(code=code)
            return
        self.socket = socket
        socket.on_message(self._receive)
        self.say_vocabulary()
        self.say_state(*self.sources)

    def _receive(self, text: str) -> None:
        message = json.loads(text)
        self.received.append(message)
        if message["type"] == "ping" and self.socket and not self.is_mute:
            self.say("pong", t=message["t"], server_ms=1000.0 * time.monotonic())

    def _answer(self, route) -> None:
        request = route.request
        path = request.url.removeprefix(self.URL)
        if path == "v1/names":
            route.fulfill(json={"names": self.known_names, "words": self.known_words})
        elif request.method == "GET":
            from zsseg_rt.server.api import load_page

            html, policy = load_page()
            headers = {"Content-Security-Policy": policy}
            route.fulfill(body=html, content_type="text/html", headers=headers)
        elif path == "v1/segment":
            self._label(route)
        else:
            self.bodies.append((path, request.post_data_json))
            if self.refuse_with is None:
                route.fulfill(json=self._change(request.post_data_json))
            else:
                status, message = self.refuse_with
                content = {"error": "VocabularyError", "message": message, "unknown": self.unknown}
                route.fulfill(status=status, json=content)

    def _label(self, route) -> None:
        """Label a picture with class 0 in its left half, class 1 in its right."""
        self.images.append(route.request.post_data_buffer)
        if self.refuse_images_with is not None:
            route.fulfill(status=self.refuse_images_with, json={"error": "", "message": ""})
            return
        body = self.frame(halves(0, 1), source="")
        route.fulfill(body=body, content_type="application/x-zsseg-frame")

    def _change(self, body: dict) -> dict:
        if "unknown_below" in body:
            self.unknown_below = body["unknown_below"]
            return body
        self.version, asked = self.version + 1, body["background"]
        self.auto_background = asked == "auto"
        self.background = asked if isinstance(asked, list) else self.background
        self.names = [[n] if isinstance(n, str) else n for n in body["classes"]]
        self.say_vocabulary()
        return self.vocabulary()


def source(name: str, state: str, error: str | None = None, **counts: int) -> dict:
    numbers = {"captured": 9, "labelled": 8, "dropped": 1, "damaged": 0, "reconnects": 0, **counts}
    numbers.setdefault("given_out", numbers["labelled"])
    ages = {"p50": 12.0, "p95": 23.0, "p99": 31.0}
    both = {"age_ms": ages, "labelled_age_ms": {name: 20 * age for name, age in ages.items()}}
    return {"name": name, "state": state, **numbers, **both, "error": error}


def halves(left: int, right: int, *, dtype=np.uint8) -> np.ndarray:
    """Labels of a picture whose halves differ, [24, 32]."""
    labels = np.full((24, 32), left, dtype)
    labels[:, 16:] = right
    return labels
