"""A backend for a CUDA device whose graphs the host computes; arrays lie on the device."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.computing_tensorrt import OnnxTensorRT, run_on_host
from zsseg_rt import ops
from zsseg_rt.backends import registry
from zsseg_rt.onnx.check import Flow, check_graph


class ForeignArray:
    """A device array as another library would own it: only its DLPack interface is known."""

    def __init__(self, array: Any) -> None:
        self._array, self.shape = array, array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def view(self, shape: tuple[int, ...]) -> "ForeignArray":
        return ForeignArray(self._array.view(shape))


def fetch(feed: Any, stream: int) -> np.ndarray:
    assert not isinstance(feed, np.ndarray)
    if isinstance(feed, ForeignArray):
        feed = ops.DeviceArray.from_numpy(feed, 0, stream)
    assert feed.device == "cuda:0"
    return feed.numpy(stream=stream)


@dataclass
class Placed:
    """A graph or a session of the host's that stands before it as a device's."""

    inner: Any
    header: Flow
    device = "cuda:0"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.header if name in ("inputs", "outputs") else self.inner, name)


@dataclass
class HostSession(Placed):
    """Feeds and results lie on ``cuda:0``; the graph runs on the host in between."""

    foreign: bool

    def run(self, feeds: Mapping[str, Any], *, stream: int = 0) -> dict[str, Any]:
        fetched = {name: fetch(feed, stream) for name, feed in feeds.items()}
        results = run_on_host(self.inner, self.header, fetched)
        placed = {n: ops.DeviceArray.from_numpy(r, 0, stream) for n, r in results.items()}
        return {n: ForeignArray(a) for n, a in placed.items()} if self.foreign else placed


@dataclass
class PlacedGraph(Placed):
    open_session: Callable[[Any, Flow], Any]
    plan_name = ""

    def session(self) -> Any:
        return self.open_session(self.inner.session(), self.header)


def usual_host() -> str:
    """OpenVINO where it is installed, else torch."""
    if registry.is_installed("openvino"):
        return "openvino"
    pytest.importorskip("torch", reason="graphs run on OpenVINO or torch")
    return "torch"


def place(
    monkeypatch: pytest.MonkeyPatch,
    open_session: Callable[[Any, Flow], Any],
    host_name: str | None = None,
    *,
    computes: bool = True,
) -> dict[str, Any]:
    """Let backend torch be one that opens such sessions on a device; an engine's settings for it.

    ``host_name``: the backend that loads graphs. Without ``computes``, graphs of a device are only
    looked at.
    """
    host, real = registry.get_backend(host_name or usual_host()), registry.get_backend

    class PlacedBackend:
        name = "torch"

        def choose(self, variants, asked, *, device, allowed):
            return host.choose(variants, asked, device="cpu", allowed=allowed)

        def load(self, graph_path, *, device, precision, options):
            if computes or device == "cpu":
                graph = host.load(graph_path, device="cpu", precision=precision, options=options)
            else:
                graph = SimpleNamespace(precision=precision, close=int, recorder=lambda: None)
                graph.session = lambda: graph
            if device == "cpu":
                return graph
            return PlacedGraph(graph, check_graph(graph_path), open_session)

    monkeypatch.setattr(
        registry, "get_backend", lambda name: PlacedBackend() if name == "torch" else real(name)
    )
    return {"device": "cuda:0", "backend": "torch"}


def host_backend(
    monkeypatch: pytest.MonkeyPatch, session_kind: str, *, host_name: str | None = None
) -> dict[str, Any]:
    """As :func:`place`; ``session_kind`` is own arrays, foreign arrays or TensorRT's."""
    if session_kind == "TensorRT's":
        monkeypatch.setitem(sys.modules, "tensorrt", OnnxTensorRT(host_name or usual_host()))
        return {"device": "cuda:0", "backend": "tensorrt"}
    foreign = session_kind == "foreign arrays"
    return place(monkeypatch, lambda *of: HostSession(*of, foreign), host_name)
