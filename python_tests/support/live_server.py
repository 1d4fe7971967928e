"""A server that shows the demo, and what a browser and a program say to it."""

import contextlib
import http.client
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
from websockets.sync.client import connect

from zsseg_rt import Engine, EngineConfig
from zsseg_rt.demo import demo_bundle
from zsseg_rt.server import Limits, LiveServer, ServerSettings

SOURCE = "test://?demo=scenes&size=160x120&rate=30"
WORDS = ("red ball", "green grass", "blue sky")
PATIENCE = 30.0  # seconds that a busy machine gets


@contextlib.contextmanager
def demo_server(source=SOURCE, *, config=None, settings=None, stream=None, **limits):
    """A running server on a free port, with the demo's bundle; ``stream`` are further options."""
    fields = {"port": 0, "limits": Limits(**limits), **(settings or {})}
    with Engine(demo_bundle("scenes"), config or EngineConfig(device="cpu")) as engine:
        engine.set_classes(WORDS)
        with LiveServer(engine, source, ServerSettings(**fields), **(stream or {})) as server:
            yield server


def request(server, method, path, body=None, **headers):
    """Send a request as a program does; returns status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, (dict, list)):
        body = json.dumps(body)
        sent.setdefault("Content-Type", "application/json")
    try:
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def ask(server, method, path, body=None, **headers):
    status, _, content = request(server, method, path, body, **headers)
    return status, json.loads(content)


def metric(server, name):
    lines = request(server, "GET", "/metrics")[2].decode().splitlines()
    mine = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in mine)


def wait_until(holds, what):
    last = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < last, f"waited in vain until {what}"
        time.sleep(0.02)


class Viewer:
    def __init__(self, socket):
        self.socket, self.texts = socket, []

    def receive(self, timeout=PATIENCE):
        """The next message: a dict, or a frame of a header, an image and labels."""
        message = self.socket.recv(timeout)
        if isinstance(message, bytes):
            return read_frame(message)
        self.texts.append(json.loads(message))
        return self.texts[-1]

    def text(self, kind):
        """The next text of a kind; a frame on the way is acknowledged."""
        return self._next(lambda message: isinstance(message, dict) and message["type"] == kind)

    def frame(self, fits=lambda frame: True):
        """The next frame that fits, others acknowledged; :meth:`acknowledge` it to get another."""
        return self._next(lambda message: not isinstance(message, dict) and fits(message))

    def say(self, kind, **content):
        self.socket.send(json.dumps({"type": kind, **content}))

    def acknowledge(self, frame):
        self.say("ack", id=frame.header["id"])

    def _next(self, fits):
        last = time.monotonic() + PATIENCE
        while time.monotonic() < last:
            message = self.receive()
            if fits(message):
                return message
            if not isinstance(message, dict):
                self.acknowledge(message)
        raise AssertionError(f"waited in vain; the texts were {self.texts}")


@contextlib.contextmanager
def viewer(server, port=None, protocols=("zsseg.v1",), **options):
    url = f"ws://127.0.0.1:{port or server.port}/v1/live"
    options = {"max_size": None, "close_timeout": 1.0, **options}
    with connect(url, subprotocols=protocols, open_timeout=PATIENCE, **options) as socket:
        yield Viewer(socket)


def read_frame(message):
    """Take a binary message apart; every byte of it must be accounted for."""
    (length,) = struct.unpack_from("<I", message)
    header = json.loads(message[4 : 4 + length])
    labels_at = 4 + length + header["image_bytes"]
    assert labels_at + header["label_bytes"] == len(message)
    labels = np.frombuffer(zlib.decompress(message[labels_at:]), header["label_dtype"])
    labels = labels.reshape(header["label_height"], header["label_width"])
    return SimpleNamespace(header=header, image=message[4 + length : labels_at], labels=labels)


@contextlib.contextmanager
def serve_process(folder, *arguments, before=(), env=None, source=SOURCE):
    """A server on a free port; killed at the end if it still runs."""
    log = Path(folder) / "serve.log"
    call = [sys.executable, "-m", "zsseg_rt", *before, "serve", "--demo", "scenes", "--port", "0"]
    call += ["--source", source, "--device", "cpu", *arguments]
    env = {**os.environ, "ZSSEG_HOME": str(folder), **(env or {})}
    with log.open("wb") as errors:
        process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=errors, env=env)
        try:
            line = process.stdout.readline().decode()
            assert line.startswith("Open http://"), log.read_text()
            address = line.split()[1]
            port = urlsplit(address).port
            yield SimpleNamespace(process=process, address=address, port=port, log=log)
        finally:
            process.kill()
            process.communicate()
