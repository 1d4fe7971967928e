"""A backend for a CUDA device whose graphs are a few of our own kernels: CUDA can record them.

A graph's results have the shapes that its file states and depend on all of its inputs' rows. Its
numbers are its own: compare runs on the device with each other, not with another backend's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from support.host_backend import ForeignArray, Placed, place
from zsseg_rt import ops


@dataclass
class DeviceSession(Placed):
    """Each result is its rows of one input times a matrix, of the dtype that the file states."""

    fault: str | None
    foreign: bool
    runs: int = 0
    _buffers: dict[str, Any] = field(default_factory=dict)

    def capture_state(self) -> Any:
        if self.fault == "not capturable":
            return None
        return tuple(a.__cuda_array_interface__["data"][0] for a in self._buffers.values())

    def run(self, feeds: Mapping[str, Any], *, stream: int = 0) -> dict[str, Any]:
        self.runs += 1
        sizes = {
            axis: size
            for spec in self.inputs
            for axis, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        }
        results, stated = {}, {spec.name: spec.dtype for spec in self.inputs}
        assert {name: str(feed.dtype) for name, feed in feeds.items()} == stated
        for spec in self.outputs:
            shape = tuple(sizes.get(size, size) for size in spec.shape)
            source = "patch_embeds" if spec.name == "patch_keys" else next(iter(feeds))
            results[spec.name] = self._multiply(spec, feeds[source], shape, stream)
        if self.fault == "waits":
            next(iter(results.values())).numpy(stream)
        return {n: ForeignArray(a) for n, a in results.items()} if self.foreign else results

    def _multiply(self, spec: Any, feed: Any, shape: tuple[int, ...], stream: int) -> Any:
        width, rows, name = shape[-1], math.prod(shape[:-1]), spec.name
        depth = math.prod(feed.shape) // rows
        out, feed = self._buffer(name, (rows, width), spec.dtype, stream), feed.view((rows, depth))
        if str(feed.dtype) == "float32":
            matrix = self._buffer(f"{name} matrix", (1, width, depth), "float32", stream)
            ops.patch_text_similarity(
                matrix, feed, normalize=False, out=out.view((1, rows, width)), stream=stream
            )
        else:  # of the operations, this writes half precision
            matrix = self._buffer(f"{name} matrix", (width, 2 * depth), feed.dtype, stream)
            bias = self._buffer(f"{name} bias matrix", (width,), "float32", stream)
            ops.relationship_descriptor_text(feed, matrix, bias, out=out, stream=stream)
        return out.view(shape)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any, stream: int) -> Any:
        buffer = self._buffers.get(name)
        if buffer is None or math.prod(buffer.shape) < math.prod(shape):
            buffer = ops.DeviceArray.empty((math.prod(shape),), dtype, 0, stream)
            if name.endswith("matrix"):
                rng = np.random.default_rng(sum(name.encode()))
                values = rng.normal(size=buffer.shape) * 4 / math.sqrt(shape[-1])
                buffer.copy_from(values.astype(dtype), stream)
            self._buffers[name] = buffer
        return buffer.view(shape)

    def close(self) -> None:
        self._buffers.clear()
        self.inner.close()


def device_backend(
    monkeypatch: pytest.MonkeyPatch, *, fault: str | None = None, foreign: bool = False
) -> tuple[dict[str, Any], list[DeviceSession]]:
    """Put it in backend torch's place; ``fault`` is "waits" or "not capturable"."""
    sessions: list[DeviceSession] = []

    def open_session(session, header):
        sessions.append(DeviceSession(session, header, fault, foreign))
        return sessions[-1]

    return place(monkeypatch, open_session, computes=False), sessions
