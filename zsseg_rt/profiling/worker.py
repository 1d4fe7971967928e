"""The program of a candidate's own process: it opens what is timed and takes turns when asked.

    EXE worker.py REPLY_FD        # see zsseg_rt/common/child_process.py

It is run as a file, by any interpreter, beside any version of zsseg_rt: it uses only that
package's public names, and two files of its own checkout: ``meter.py`` and
``common/child_process.py``. The first request says what to open.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_WARM_UP_SECONDS = 0.3
_WARM_UP_CALLS = 3


def load_file(name: str, path: Path) -> Any:
    """Import a file without looking at the folder it is in."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: expected a Python file. Check the path.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Function:
    """What a function in a file returns, and the parts of it that it has."""

    on_gpu, stages_of = False, None

    def __init__(self, spec: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        module = load_file("candidate", Path(spec["file"]))
        self.call = getattr(module, spec["function"])(**spec.get("arguments", {}))
        opened = time.perf_counter()
        self.call()
        self.started = {"load_s": opened - begin, "first_frame_s": time.perf_counter() - opened}
        self.described = getattr(self.call, "described", {})
        self.labels = getattr(self.call, "labels", None)
        self.select = getattr(self.call, "select", None)

    def check(self) -> str:
        return ""

    def nodes(self, runs: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class _Engine:
    """An engine that labels the next frame; with streams, one frame on each lane at once."""

    select = None

    def __init__(self, spec: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        import zsseg_rt

        imported = time.perf_counter()
        import numpy as np

        self._frames, self._next = [np.load(path) for path in spec["frames"]], 0
        embeddings = None if spec.get("embeddings") is None else np.load(spec["embeddings"])
        before, others = time.perf_counter(), int(spec.get("streams", 1)) - 1
        lanes = {"num_lanes": others + 1} if others else {}
        config = zsseg_rt.EngineConfig(**{"with_times": True, **spec["config"], **lanes})
        self._engine = engine = zsseg_rt.Engine(spec["bundle"], config)
        loaded = time.perf_counter()
        vocabulary = engine.set_classes(
            spec["classes"],
            embeddings=embeddings,
            background=spec.get("background"),
            templates=spec.get("templates"),
        )
        named = time.perf_counter()
        engine.segment(self._frames[0])
        self.started = {
            "import_s": imported - begin,
            "load_s": loaded - before,
            "classes_s": named - loaded,
            "first_frame_s": time.perf_counter() - named,
        }
        self.described = {
            "backend": engine.backend, "device": engine.device, "precision": engine.precision,
            "classes": len(vocabulary.names), "version": zsseg_rt.__version__,
            "python": ".".join(map(str, sys.version_info[:3])), "library": _library(engine.backend),
        }  # fmt: skip
        self.on_gpu = engine.device != "cpu"
        self._lanes = [engine.lane() for _ in range(others)]
        self._pool = ThreadPoolExecutor(others) if others else None

    def call(self) -> Any:
        pending = [
            self._pool.submit(one.segment, self._frame()) for one in self._lanes if self._pool
        ]
        result = self._engine.segment(self._frame())
        for other in pending:
            other.result()
        return result

    def _frame(self) -> Any:
        self._next += 1
        return self._frames[(self._next - 1) % len(self._frames)]

    def stages_of(self, result: Any) -> Mapping[str, float]:
        times: Mapping[str, float] = result.times
        return times

    def labels(self, index: int) -> Any:
        return self._engine.segment(self._frames[index]).labels

    def check(self) -> str:
        """The first stage that left the golden sample, with its error; empty if none did."""
        failure = self._engine.self_check().first_failure
        if failure is None:
            return ""
        return f"{failure.stage}: error {failure.error:.3g}, tolerance {failure.tolerance:.3g}"

    def nodes(self, runs: int) -> dict[str, list[list[Any]]]:
        """Name, type and milliseconds of the nodes of every graph."""
        found = self._engine.node_times(self._frames[0], runs=runs)
        return {graph: [[n.name, n.type, n.ms] for n in nodes] for graph, nodes in found.items()}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._engine.close()


def _library(backend: str) -> str:
    """The backend's package with its version; empty where a system's own has none."""
    for package in (backend, "tensorrt_rtx") if backend == "tensorrt" else (backend,):
        module = sys.modules.get(package)
        if module is not None and (version := getattr(module, "__version__", None)):
            return f"{package} {str(version).partition('-')[0]}"
    return ""


class _Worker:
    """Answers requests ``{"do": NAME, ...}`` about one candidate."""

    def __init__(self) -> None:
        self._times = load_file("zsseg_rt_meter", _HERE / "meter.py")
        self._one: Any = None
        self._meter: Any = None

    def answer(self, request: Mapping[str, Any], _: Callable[[Any], None]) -> Any:
        given = {key: value for key, value in request.items() if key != "do"}
        if self._one is None and request["do"] != "open":
            raise RuntimeError("worker: expected the request 'open' first")
        return getattr(self, f"do_{request['do']}")(**given)

    def do_open(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        self._one = one = _Function(spec) if "function" in spec else _Engine(spec)
        stage = "total" if one.on_gpu else None
        self._meter = self._times.Meter(stages_of=one.stages_of, device_stage=stage)
        told = {name: getattr(one, name) for name in ("started", "described", "on_gpu")}
        return {**told, "memory": self.do_memory()}

    def do_check(self) -> str:
        return str(self._one.check())

    def do_warm(self) -> float:
        """The milliseconds of the fastest call."""
        watch = self._times.Stopwatch()
        times: list[float] = []
        while watch.seconds < _WARM_UP_SECONDS or len(times) < _WARM_UP_CALLS:
            times.append(self._meter.measure(self._one.call).wall_ms)
        return float(min(times))

    def do_turn(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        turn = self._meter.turn(self._one.call, self._times.TurnPlan(**plan))
        return dataclasses.asdict(turn)

    def do_pace(self, rate: float, seconds: float) -> list[dict[str, Any]]:
        frames = self._meter.pace(self._one.call, rate=rate, seconds=seconds)
        return [dataclasses.asdict(frame) for frame in frames]

    def do_stretch(self, seconds: float) -> int:
        return int(self._meter.stretch(self._one.call, seconds))

    def do_labels(self, out: str, index: int) -> None:
        import numpy as np

        if self._one.labels is not None:
            np.save(out, np.asarray(self._one.labels(index)))

    def do_select(self, values: Mapping[str, Any]) -> float:
        """The seconds until the first result of what was selected."""
        watch = self._times.Stopwatch()
        if self._one.select is None:
            raise RuntimeError("select: expected a candidate that has a choice, got another one")
        self._one.select(**values)
        self._one.call()
        return float(watch.seconds)

    def do_nodes(self, runs: int) -> dict[str, list[list[Any]]]:
        nodes: dict[str, list[list[Any]]] = self._one.nodes(runs)
        return nodes

    def do_memory(self) -> list[float] | None:
        found = self._times.read_memory_mb()
        return None if found is None else list(found)

    def close(self) -> None:
        if self._one is not None:
            self._one.close()


def main() -> None:
    """Answer requests until standard input ends."""
    if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
        del sys.path[0]  # its neighbours must not shadow Python's own modules
    children = load_file("zsseg_rt_child", _HERE.parent / "common" / "child_process.py")
    worker = _Worker()
    children.answer_requests(worker.answer)
    worker.close()


if __name__ == "__main__":
    main()
