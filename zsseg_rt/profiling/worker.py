"""Time calls; and the program of a candidate's own process, which takes turns when asked.

It is also run as a file by any interpreter, beside any version of zsseg_rt, as ``EXE worker.py
REPLY_FD``: it uses only public names, and ``common/child_process.py`` of its own checkout.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_WARM_UP_SECONDS = 0.3
_WARM_UP_CALLS = 3
_PROC = Path("/proc")
_SETTLING_SECONDS = 0.05


@dataclass(frozen=True)
class Sample:
    """One call."""

    wall_ms: float  # from call to return
    cpu_ms: float  # of all threads of the process meanwhile
    device_ms: float | None = None  # between CUDA events around the work; None on the CPU
    stages: Mapping[str, float] = field(default_factory=dict)  # of the result's own clock


@dataclass(frozen=True)
class Turn:
    """The calls of one candidate in one round: one after a pause, and those that followed."""

    cold: Sample | None
    warm: tuple[Sample, ...]


@dataclass(frozen=True)
class TurnPlan:
    """The parts of a turn."""

    pause_ms: float = 5.0  # sleep before the first call
    cold: bool = True  # whether that call is reported on its own
    warming_ms: float = 0.0  # calls for so long that are not reported
    measuring_ms: float = 10.0  # calls for so long, at least one, that are
    most_calls: int = 16


ThreadTimes = Mapping[str, tuple[int, int]]
"""How long each thread ran, and waited for a CPU, since it began: nanoseconds."""


class LocalCandidate:
    """A function that is called again and again; what it raises passes through.

    A ``device_timer`` has ``begin()``, and ``end_ms()``, which waits for the work on the device.
    With ``device_stage``, that stage of the result's own clock is the device's time.
    """

    process: int | str = "self"  # whose threads are looked at

    def __init__(
        self,
        name: str,
        call: Any,
        *,
        device_timer: Any = None,
        stages_of: Callable[[Any], Mapping[str, float]] | None = None,
        device_stage: str | None = None,
    ) -> None:
        self.name, self.call, self._device_timer = name, call, device_timer
        self._stages_of, self._device_stage = stages_of, device_stage
        self.on_gpu = device_timer is not None or device_stage is not None

    def measure(self) -> Sample:
        """Make one call."""
        timer = self._device_timer
        used = time.process_time()
        begin = time.perf_counter()
        if timer is not None:
            timer.begin()
        result = self.call()
        device_ms = None if timer is None else timer.end_ms()
        wall = time.perf_counter() - begin
        used = time.process_time() - used
        stages = {} if self._stages_of is None else dict(self._stages_of(result))
        if self._device_stage is not None:
            device_ms = stages.get(self._device_stage)
        return Sample(wall * 1e3, used * 1e3, device_ms, stages)

    def turn(self, plan: TurnPlan) -> Turn:
        """Take one turn; see :class:`TurnPlan`."""
        time.sleep(plan.pause_ms / 1e3)
        cold = self.measure() if plan.cold else None
        watch = Stopwatch()
        while watch.seconds * 1e3 < plan.warming_ms:
            self.measure()  # a call that only enqueues would leave its work to the next one
        warm, watch = [self.measure()], Stopwatch()
        left = plan.measuring_ms - warm[0].wall_ms
        while len(warm) < plan.most_calls and watch.seconds * 1e3 < left:
            warm.append(self.measure())
        return Turn(cold, tuple(warm))

    def pace(self, rate: float, seconds: float) -> list[tuple[float, float]]:
        """Make calls that fall due by a clock; one that waits for another is not dropped.

        Milliseconds of each until it was done: from when it fell due, and from its call.
        """
        frames, start = [], time.perf_counter()
        for index in range(max(1, round(rate * seconds))):
            due = start + index / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            begin = time.perf_counter()
            self.call()
            done = time.perf_counter()
            frames.append(((done - due) * 1e3, (done - begin) * 1e3))
        return frames

    def stretch(self, seconds: float) -> int:
        """Make calls one after the other for so long; return how many."""
        watch, count = Stopwatch(), 0
        while watch.seconds < seconds:
            self.call()
            count += 1
        return count

    def warm_up(self) -> float:
        """Make calls until caches and threads are warm; return the fastest one's milliseconds."""
        watch = Stopwatch()
        times: list[float] = []
        while watch.seconds < _WARM_UP_SECONDS or len(times) < _WARM_UP_CALLS:
            times.append(self.measure().wall_ms)
        return min(times)

    def settle(self) -> None:
        """Wait until its threads sleep, so that they do not disturb the next candidate."""
        settle_threads(self.process)

    def thread_times(self) -> ThreadTimes:
        """Run and waiting time of its process's threads."""
        return read_thread_times(self.process)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self._begin


def read_thread_times(process: int | str = "self") -> ThreadTimes:
    """Run and waiting time of a process's threads; empty if unknown. It takes 0.3 ms."""
    threads = ((name, content.split()) for name, content in _of_threads(process, "schedstat"))
    return {name: (int(fields[0]), int(fields[1])) for name, fields in threads}


def waiting_share(before: ThreadTimes, after: ThreadTimes) -> float | None:
    """The share of their runnable time that threads waited for a CPU; None if none ran."""
    earlier = [before.get(name, (0, 0)) for name in after]
    ran, waited = (
        sum(times[i] for times in after.values()) - sum(times[i] for times in earlier)
        for i in (0, 1)
    )
    return waited / (ran + waited) if ran + waited > 0 else None


def settle_threads(process: int | str = "self", seconds: float = _SETTLING_SECONDS) -> bool:
    """Wait until a process's threads sleep, the calling one apart; whether they sleep now."""
    own = str(threading.get_native_id()) if process == "self" else ""
    end = time.perf_counter() + seconds  # thread pools spin for a while
    while any(
        name != own and content.rpartition(")")[2].split()[0] == "R"
        for name, content in _of_threads(process, "stat")
    ):
        if time.perf_counter() >= end:
            return False
        time.sleep(0.0005)
    return True


def read_memory_mb(process: int | str = "self") -> tuple[float, float] | None:
    """A process's resident memory now and at its peak, in MB; None if unknown."""
    try:
        status = (_PROC / str(process) / "status").read_text()
    except OSError:
        return None
    kilobytes = dict(re.findall(r"^(VmRSS|VmHWM):\s*([0-9]+)", status, re.MULTILINE))
    if len(kilobytes) < 2:
        return None
    return int(kilobytes["VmRSS"]) * 1024 / 1e6, int(kilobytes["VmHWM"]) * 1024 / 1e6


def _of_threads(process: int | str, name: str) -> Iterator[tuple[str, str]]:
    for file in (_PROC / str(process) / "task").glob(f"*/{name}"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield file.parent.name, file.read_text()


def load_file(name: str, path: Path) -> Any:
    """Import a file without looking at the folder it is in."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: expected a Python file. Check the path.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class _Engine:
    """Labels the next frame; with streams, one frame on each lane at once."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        watch = Stopwatch()
        import zsseg_rt

        imported = watch.seconds
        import numpy as np

        self._frames, self._next = [np.load(path) for path in spec["frames"]], 0
        embeddings = None if spec.get("embeddings") is None else np.load(spec["embeddings"])
        before, others = watch.seconds, int(spec.get("streams", 1)) - 1
        lanes = {"num_lanes": others + 1} if others else {}
        config = zsseg_rt.EngineConfig(**{"with_times": True, **spec["config"], **lanes})
        self._engine = engine = zsseg_rt.Engine(spec["bundle"], config)
        loaded = watch.seconds
        words = {key: spec.get(key) for key in ("background", "templates")}
        vocabulary = engine.set_classes(spec["classes"], embeddings=embeddings, **words)
        named = watch.seconds
        engine.segment(self._frames[0])
        self.started = {
            "import_s": imported, "load_s": loaded - before, "classes_s": named - loaded,
            "first_frame_s": watch.seconds - named,
        }  # fmt: skip
        self.described = {
            "backend": engine.backend, "device": engine.device, "precision": engine.precision,
            "classes": len(vocabulary.names), "version": zsseg_rt.__version__,
            "python": ".".join(map(str, sys.version_info[:3])), "library": _library(engine.backend),
        }  # fmt: skip
        self._lanes = [engine.lane() for _ in range(others)]
        self._pool = ThreadPoolExecutor(others + 1)

    def __call__(self) -> Any:
        pending = [self._pool.submit(one.segment, self._frame()) for one in self._lanes]
        result = self._engine.segment(self._frame())
        for other in pending:
            other.result()
        return result

    def _frame(self) -> Any:
        self._next += 1
        return self._frames[(self._next - 1) % len(self._frames)]

    def labels(self, index: int) -> Any:
        return self._engine.segment(self._frames[index]).labels

    def check(self) -> str:
        """The first stage that left the golden sample, with its error; empty if none did."""
        failure = self._engine.self_check().first_failure
        if failure is None:
            return ""
        return f"{failure.stage}: error {failure.error:.3g}, tolerance {failure.tolerance:.3g}"

    def nodes(self, runs: int) -> dict[str, Any]:
        """Name, type and milliseconds of the nodes of every graph."""
        graphs = self._engine.node_times(self._frames[0], runs=runs)
        return {graph: [[n.name, n.type, n.ms] for n in nodes] for graph, nodes in graphs.items()}

    def close(self) -> None:
        self._pool.shutdown()
        self._engine.close()


def _library(backend: str) -> str:
    """The backend's package with its version; empty where a system's own has none."""
    for package in (backend, "tensorrt_rtx") if backend == "tensorrt" else (backend,):
        module = sys.modules.get(package)
        if module is not None and (version := getattr(module, "__version__", None)):
            return f"{package} {str(version).partition('-')[0]}"
    return ""


def _open(spec: Mapping[str, Any]) -> tuple[LocalCandidate, Mapping[str, float]]:
    """An engine, or what a function in a file returns, with the seconds of its start.

    The latter may have ``described``, ``labels(index)`` and ``select(...)``.
    """
    watch = Stopwatch()
    if "function" not in spec:
        engine = _Engine(spec)
        stage = None if engine.described["device"] == "cpu" else "total"
        times = lambda seg: seg.times  # noqa: E731
        return LocalCandidate("", engine, stages_of=times, device_stage=stage), engine.started
    module = load_file("candidate", Path(spec["file"]))
    call = getattr(module, spec["function"])(**spec.get("arguments", {}))
    loaded = watch.seconds
    call()
    return LocalCandidate("", call), {"load_s": loaded, "first_frame_s": watch.seconds - loaded}


def main() -> None:
    """Answer requests until standard input ends: ``open`` first, then a candidate's methods."""
    if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:
        del sys.path[0]  # its neighbours must not shadow Python's own modules
    candidates: list[LocalCandidate] = []

    def answer(request: dict[str, Any], _: Callable[[Any], None]) -> Any:
        action = request.pop("do")
        if action == "open":
            one, started = _open(request["spec"])
            candidates.append(one)
            described = getattr(one.call, "described", {})
            return {"started": started, "described": described, "on_gpu": one.on_gpu,
                    "memory": read_memory_mb()}  # fmt: skip
        (one,) = candidates
        if action == "turn":
            return one.turn(TurnPlan(**request["plan"]))
        if action == "select":
            watch = Stopwatch()
            one.call.select(**request)
            one.call()
            return watch.seconds
        if action == "save_labels":
            import numpy as np

            return np.save(request["file"], np.asarray(one.call.labels(request["index"])))
        return getattr(one if hasattr(one, action) else one.call, action)(**request)

    child_process = load_file("zsseg_rt_child", _HERE.parent / "common" / "child_process.py")
    child_process.answer_requests(answer)
    for one in candidates:
        getattr(one.call, "close", int)()


if __name__ == "__main__":
    main()
