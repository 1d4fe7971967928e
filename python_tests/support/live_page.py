"""A browser that looks at the server's page, and a server that does what real ones seldom do."""

import base64
import json
import re
import time
from contextlib import contextmanager

import numpy as np

from zsseg_rt import Frame, Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.server.api import load_page
from zsseg_rt.server.hub import encode_message

PATIENCE = 30_000  # ms that anything may take on a busy machine

# Left in window.refused: what the page's Content-Security-Policy did not let it do.
_WATCH = """
window.refused = [];
addEventListener("securitypolicyviolation", (event) => {
  refused.push(`${event.violatedDirective}: ${event.blockedURI}`);
});
"""
# Width, height and colours of the canvas, [r, g, b, a] a pixel, row by row.
_PIXELS = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const bytes = btoa(Array.from(data, (value) => String.fromCharCode(value)).join(""));
  return [canvas.width, canvas.height, bytes];
}"""
# Chromium itself reports addresses that do not answer; tests stop servers on purpose.
_EXPECTED = r"net::ERR_|WebSocket connection to|Failed to load resource|willReadFrequently"


def expect(locator):
    from playwright import sync_api

    sync_api.expect.set_options(timeout=PATIENCE)
    return sync_api.expect(locator)


@contextmanager
def open_page(browser, *, size=(1280, 800), **settings):
    """A page in a context of its own; at the end, nothing in it may have failed or been refused."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **settings)
    context.set_default_timeout(PATIENCE)
    context.add_init_script(_WATCH)
    page, failures, messages = context.new_page(), [], []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda message: messages.append(message))
    yield page
    failures += page.evaluate("window.refused ?? []")
    context.close()
    texts = [message.text for message in messages if message.type in ("error", "warning")]
    assert failures + [text for text in texts if not re.search(_EXPECTED, text)] == []


def canvas_pixels(page) -> np.ndarray:
    """The canvas as drawn, uint8 [H, W, 3]."""
    width, height, pixels = page.locator("#picture").evaluate(_PIXELS)
    pixels = np.frombuffer(base64.b64decode(pixels), np.uint8)
    return pixels.reshape(height, width, 4)[..., :3]


def class_colours(*names: str) -> list[tuple[int, ...]]:
    return [tuple(colour) for colour in palette(names).tolist()]


def _groups(names) -> list[list[str]]:
    return [[name] if isinstance(name, str) else list(name) for name in names]


class ScriptedServer:
    """Answers a page out of memory; the test decides what is sent and when.

    Its address is not a secure one, as that of a camera's computer in a local network is not:
    browsers withhold some functions there.
    """

    URL = "http://camera.test/"
    token, version, unknown_below = "", 1, 0.0
    background, auto_background, remarks = (), False, ()
    known_names = known_words = unknown = ()
    refuse_with = refuse_images_with = close_with = socket = None
    is_mute = False

    def __init__(self, page, names=("road", "sky"), **settings) -> None:
        self.page, self.names = page, _groups(names)
        self.sources, self.frames = [source("camera", "running")], 0
        self.received, self.bodies, self.images = [], [], []
        vars(self).update(settings)
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
        names = [group[0] for group in self.names]
        facts = ("version", "background", "auto_background", "remarks", "unknown_below")
        return {name: getattr(self, name) for name in facts} | {
            "unknown_label": 255 if len(names) <= 254 else 65535,
            "classes": [
                {"name": group[0], "synonyms": group[1:], "colour": colour}
                for group, colour in zip(self.names, palette(names).tolist(), strict=True)
            ],
        }

    def say(self, kind: str, **content) -> None:
        self.socket.send(json.dumps({"type": kind, **content}))

    def say_state(self, *sources: dict, rate: float = 12.0, given_out_rate: float = 12.0) -> None:
        self.sources = list(sources)
        rates = {"rate": rate, "given_out_rate": given_out_rate}
        self.say("state", sources=self.sources, viewers=1, **rates)

    def change(self, *names) -> None:
        """New classes, as if another viewer had asked for them."""
        self.version, self.names = self.version + 1, _groups(names)
        self.say("vocabulary", **self.vocabulary())

    def send_frame(self, labels: np.ndarray, **header) -> None:
        """Send a grey picture twice as wide and high as its labels, and wait until it was drawn."""
        self.socket.send(self.frame(labels, **header))
        self.wait_for(lambda: any(ack["id"] == self.frames for ack in self.taken("ack")))

    def frame(self, labels: np.ndarray, *, age_ms: float = 0.0, **header) -> bytes:
        """A message as the real server packs it; ``header`` replaces some of its entries."""
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
        if self.close_with is not None or socket.protocols != wanted:
            socket.close(code=self.close_with or 4401)
            return
        self.socket = socket
        socket.on_message(self._receive)
        self.say("vocabulary", **self.vocabulary())
        self.say_state(*self.sources)

    def _receive(self, text: str) -> None:
        message = json.loads(text)
        self.received.append(message)
        if message["type"] == "ping" and self.socket and not self.is_mute:
            self.say("pong", t=message["t"], server_ms=1000.0 * time.monotonic())

    def _answer(self, route) -> None:
        request, (html, policy) = route.request, load_page()
        path = request.url.removeprefix(self.URL)
        if path == "v1/names":
            route.fulfill(json={"names": self.known_names, "words": self.known_words})
        elif request.method == "GET":
            headers = {"Content-Security-Policy": policy}
            route.fulfill(body=html, content_type="text/html", headers=headers)
        elif path == "v1/segment":
            self.images.append(request.post_data_buffer)
            if self.refuse_images_with is not None:
                route.fulfill(status=self.refuse_images_with, json={"error": "", "message": ""})
            else:
                body = self.frame(halves(0, 1), source="")
                route.fulfill(body=body, content_type="application/x-zsseg-frame")
        else:
            self.bodies.append((path, request.post_data_json))
            if self.refuse_with is None:
                route.fulfill(json=self._change(request.post_data_json))
            else:
                status, message = self.refuse_with
                content = {"error": "VocabularyError", "message": message, "unknown": self.unknown}
                route.fulfill(status=status, json=content)

    def _change(self, body: dict) -> dict:
        if "unknown_below" in body:
            self.unknown_below = body["unknown_below"]
            return body
        asked = body["background"]
        self.auto_background = asked == "auto"
        self.background = asked if isinstance(asked, list) else self.background
        self.change(*body["classes"])
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
