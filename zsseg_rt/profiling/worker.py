"""The program of a candidate's own process: it opens what is timed and takes turns when asked.

    EXE worker.py REPLY_FD        # see zsseg_rt/common/child_process.py

It is run as a file, by any interpreter, beside any version of zsseg_rt: it uses only that
package's public names, and two files of its own checkout: ``meter.py`` and
``common/child_process.py``. The first request says what to open.
"""

from __future__ import annotations

import dataclasses
import importlib
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


@dataclasses.dataclass
class Opened:
    """What takes turns.

    Attributes:
        call: Makes one call.
        close: Frees everything.
        started: Seconds of the parts of the cold start.
        described: What runs, as plain data.
        stages_of: As the meter's.
        on_gpu: Whether it runs on a GPU.
        check: Compares with the golden sample; returns the stage that differs, or "".
        labels: Labels of a frame, by its number.
        nodes: Times the nodes of every graph, the mean of so many runs.
        select: Changes what calls work on, by keyword arguments.
    """

    call: Callable[[], Any]
    close: Callable[[], None]
    started: dict[str, float]
    described: dict[str, Any]
    stages_of: Callable[[Any], Mapping[str, float]] | None = None
    on_gpu: bool = False
    check: Callable[[], str] | None = None
    labels: Callable[[int], Any] | None = None
    nodes: Callable[[int], dict[str, list[list[Any]]]] | None = None
    select: Callable[..., None] | None = None


def open_candidate(spec: Mapping[str, Any]) -> Opened:
    """Open an engine, or what a function in a file returns."""
    return _open_function(spec) if "function" in spec else _open_engine(spec)


def _open_function(spec: Mapping[str, Any]) -> Opened:
    begin = time.perf_counter()
    module = load_file("candidate", Path(spec["file"]))
    call = getattr(module, spec["function"])(**spec.get("arguments", {}))
    opened = time.perf_counter()
    call()
    started = {"load_s": opened - begin, "first_frame_s": time.perf_counter() - opened}
    return Opened(
        call,
        lambda: None,
        started,
        getattr(call, "described", {}),
        labels=getattr(call, "labels", None),
        select=getattr(call, "select", None),
    )


def _open_engine(spec: Mapping[str, Any]) -> Opened:
    begin = time.perf_counter()
    import zsseg_rt

    imported = time.perf_counter()
    import numpy as np

    frames = [np.load(path) for path in spec["frames"]]
    embeddings = None if spec.get("embeddings") is None else np.load(spec["embeddings"])
    before = time.perf_counter()
    streams = int(spec.get("streams", 1))
    lanes = {"num_lanes": streams} if streams > 1 else {}
    options = {"with_times": True, **spec["config"], **lanes}
    engine = zsseg_rt.Engine(spec["bundle"], zsseg_rt.EngineConfig(**options))
    loaded = time.perf_counter()
    vocabulary = engine.set_classes(
        spec["classes"],
        embeddings=embeddings,
        background=spec.get("background"),
        templates=spec.get("templates"),
    )
    named = time.perf_counter()
    engine.segment(frames[0])
    started = {
        "import_s": imported - begin,
        "load_s": loaded - before,
        "classes_s": named - loaded,
        "first_frame_s": time.perf_counter() - named,
    }
    call, close = _calls(engine, frames, streams)
    described = {
        "backend": engine.backend, "device": engine.device, "precision": engine.precision,
        "classes": len(vocabulary.names), "version": zsseg_rt.__version__,
        "python": ".".join(map(str, sys.version_info[:3])), "library": _library(engine.backend),
    }  # fmt: skip
    return Opened(
        call,
        close,
        started,
        described,
        stages_of=lambda result: result.times,
        on_gpu=engine.device != "cpu",
        check=lambda: _check(engine),
        labels=lambda index: engine.segment(frames[index]).labels,
        nodes=lambda runs: _nodes(engine, frames[0], runs),
    )


def _library(backend: str) -> str:
    """The backend's package with its version; empty where a system's own has none."""
    for package in (backend, "tensorrt_rtx") if backend == "tensorrt" else (backend,):
        module = sys.modules.get(package)
        if module is not None and (version := getattr(module, "__version__", None)):
            return f"{package} {str(version).partition('-')[0]}"
    return ""


def _calls(
    engine: Any, frames: list[Any], streams: int
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Label the next frame; with several streams, one frame on each lane at the same time."""
    state = {"next": 0}

    def following() -> Any:
        frame = frames[state["next"] % len(frames)]
        state["next"] += 1
        return frame

    if streams == 1:
        return (lambda: engine.segment(following())), engine.close
    lanes = [engine.lane() for _ in range(streams - 1)]
    pool = ThreadPoolExecutor(streams - 1)

    def call() -> Any:
        others = [pool.submit(lane.segment, following()) for lane in lanes]
        result = engine.segment(following())
        for other in others:
            other.result()
        return result

    def close() -> None:
        pool.shutdown()
        engine.close()

    return call, close


def _check(engine: Any) -> str:
    """Name the first stage that left the golden sample, with its error; empty if none did."""
    failure = engine.self_check().first_failure
    if failure is None:
        return ""
    return f"{failure.stage}: error {failure.error:.3g}, tolerance {failure.tolerance:.3g}"


def _nodes(engine: Any, frame: Any, runs: int) -> dict[str, list[list[Any]]]:
    """Name, type and milliseconds of the nodes of every graph."""
    found = engine.node_times(frame, runs=runs)
    return {graph: [[n.name, n.type, n.ms] for n in nodes] for graph, nodes in found.items()}


class Worker:
    """Answers requests about one candidate."""

    def __init__(self) -> None:
        self._meter_module = load_file("zsseg_rt_meter", _HERE / "meter.py")
        self._opened: Opened | None = None
        self._meter: Any = None

    def answer(self, request: Mapping[str, Any], _: Callable[[Any], None]) -> Any:
        """Do what a request asks for; ``{"do": NAME, ...}``."""
        action = {
            "open": self._open, "check": self._check, "warm": self._warm_up, "turn": self._turn,
            "pace": self._pace, "labels": self._labels, "memory": self._memory,
            "nodes": self._nodes, "stretch": self._stretch, "select": self._select,
        }[request["do"]]  # fmt: skip
        return action(request)

    def close(self) -> None:
        """Free the candidate."""
        if self._opened is not None:
            self._opened.close()

    def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self._opened = opened = open_candidate(request["spec"])
        self._meter = self._meter_module.Meter(
            stages_of=opened.stages_of, device_stage="total" if opened.on_gpu else None
        )
        return {
            "started": opened.started,
            "described": opened.described,
            "on_gpu": opened.on_gpu,
            "memory": self._memory(request),
        }

    def _check(self, _: Mapping[str, Any]) -> str:
        check = self._candidate().check
        return "" if check is None else check()

    def _warm_up(self, _: Mapping[str, Any]) -> float:
        """Return the milliseconds of the fastest call."""
        call, watch = self._candidate().call, self._meter_module.Stopwatch()
        times: list[float] = []
        while watch.seconds < _WARM_UP_SECONDS or len(times) < _WARM_UP_CALLS:
            times.append(self._meter.measure(call).wall_ms)
        return float(min(times))

    def _turn(self, request: Mapping[str, Any]) -> dict[str, Any]:
        plan = self._meter_module.TurnPlan(**request["plan"])
        return dataclasses.asdict(self._meter.turn(self._candidate().call, plan))

    def _pace(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        paced = self._meter.pace(
            self._candidate().call, rate=request["rate"], seconds=request["seconds"]
        )
        return [dataclasses.asdict(frame) for frame in paced]

    def _stretch(self, request: Mapping[str, Any]) -> int:
        return int(self._meter.stretch(self._candidate().call, request["seconds"]))

    def _labels(self, request: Mapping[str, Any]) -> None:
        import numpy as np

        labels = self._candidate().labels
        if labels is not None:
            np.save(request["out"], np.asarray(labels(request["index"])))

    def _select(self, request: Mapping[str, Any]) -> float:
        """Return the seconds until the first result of what was selected."""
        opened, watch = self._candidate(), self._meter_module.Stopwatch()
        if opened.select is None:
            raise RuntimeError("select: expected a candidate that has a choice, got another one")
        opened.select(**request["values"])
        opened.call()
        return float(watch.seconds)

    def _nodes(self, request: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
        nodes = self._candidate().nodes
        return {} if nodes is None else nodes(request["runs"])

    def _memory(self, _: Mapping[str, Any]) -> list[float] | None:
        found = self._meter_module.read_memory_mb()
        return None if found is None else list(found)

    def _candidate(self) -> Opened:
        if self._opened is None:
            raise RuntimeError("worker: expected the request 'open' first")
        return self._opened


def main() -> None:
    """Answer requests until standard input ends."""
    if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
        del sys.path[0]  # its neighbours must not shadow Python's own modules
    children = load_file("zsseg_rt_child", _HERE.parent / "common" / "child_process.py")
    worker = Worker()
    children.answer_requests(worker.answer)
    worker.close()


if __name__ == "__main__":
    main()
