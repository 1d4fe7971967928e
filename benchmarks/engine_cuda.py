"""The engine on a GPU, beside eager torch of the same weights; ``engine.py --device cuda`` runs it.

A frame goes in, labels of its size come out: from host to host, as a camera program has them, and
from device to device. torch does the same work (resize, normalise, model, upsample, sigmoid,
argmax) at the engine's precision and at float32. All candidates of a case take turns. What a
machine cannot tell (launches without CUPTI, a rival that runs out of memory) is said, not zero.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt import Bundle, Engine, EngineConfig, ops
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.ops import reference
from zsseg_rt.profiling.meter import Sample, Stopwatch, TurnPlan
from zsseg_rt.profiling.turns import take_turns_locally

ROOT = Path(__file__).resolve().parents[1]
SIZES_HW = ((480, 640), (512, 512), (1080, 1920))
CLASS_COUNTS = (20, 171, 1000)
PRECISIONS = ("float16", "float32")
CASE_SECONDS = 5.0
SWAPS = 20
PLAN = TurnPlan(pause_ms=0.0, cold=False, warming_ms=5.0, measuring_ms=40.0, most_calls=16)


@dataclass(kw_only=True)
class Setting:
    """Where and what is measured.

    Attributes:
        torch_device: Where torch computes.
        engine: Settings of every engine.
        sizes_hw: Frames.
        class_counts: Numbers of classes.
        rounds: Turns a candidate takes in a case at most.
    """

    torch_device: str = "cuda:0"
    engine: Mapping[str, Any] = field(
        default_factory=lambda: {"device": "cuda:0", "use_cache": False}
    )
    sizes_hw: tuple[tuple[int, int], ...] = SIZES_HW
    class_counts: tuple[int, ...] = CLASS_COUNTS
    rounds: int = 40


def run(args: argparse.Namespace, bundle: Path, model: Any, setting: Setting) -> dict[str, Any]:
    """Measure every case; returns the report.

    Args:
        args: ``size`` for the record.
        bundle: Holds the model's float32 and float16 graphs.
        model: The ZegCLIP model that the bundle was exported from.
        setting: Where and what.
    """
    import torch

    text = random_text(Bundle.load(bundle).text.embed_dim, max(setting.class_counts))
    report: dict[str, Any] = {
        "device": "cuda",
        "size": args.size,
        "machine": describe_machine(torch) | {"gpu": str(ops.cuda_device_properties(0))},
        "gpu_before": read_gpu(),
        "commit": describe_commit(ROOT),
    }
    engines, report["memory_mb"] = {}, {}
    try:
        for precision in PRECISIONS:
            engine, taken = open_engine(bundle, precision, text, setting)
            engines[precision], report["memory_mb"][f"engine {precision}"] = engine, taken
        report["backend"] = {name: engine.backend for name, engine in engines.items()}
        rivals = {name: TorchRival(model, name, setting.torch_device) for name in PRECISIONS}
        report["cases"] = list(measure_cases(engines, rivals, text, setting))
        report["set_classes_ms"] = measure_swaps(engines[PRECISIONS[0]], text, setting)
    finally:
        for engine in engines.values():
            engine.close()
    report["gpu_after"] = read_gpu()
    return report


def open_engine(
    bundle: Path, precision: str, text: np.ndarray, setting: Setting
) -> tuple[Engine, float | str]:
    """Open an engine and label one frame; returns it and the megabytes that this took."""
    before = free_bytes(setting.torch_device)
    engine = Engine(bundle, EngineConfig(precision=precision, **setting.engine))
    set_classes(engine, text, setting.class_counts[0])
    engine.segment(random_frame(setting.sizes_hw[0]))
    after = free_bytes(setting.torch_device)
    if before is None or after is None:
        return engine, "missing: the device does not tell"
    return engine, (before - after) / 1e6


def measure_cases(
    engines: Mapping[str, Engine],
    rivals: Mapping[str, TorchRival],
    text: np.ndarray,
    setting: Setting,
) -> Iterator[dict[str, Any]]:
    """Every frame size with every number of classes."""
    for size_hw in setting.sizes_hw:
        frame = random_frame(size_hw)
        for count in setting.class_counts:
            for engine in engines.values():
                set_classes(engine, text, count)
            for rival in rivals.values():
                rival.set_classes(text[:count])
            calls, missing = candidates(engines, rivals, frame)
            yield {
                "frame_hw": size_hw,
                "classes": count,
                "candidates": measure(calls, setting),
                "missing": missing,
                "agreement": agreement(engines, rivals, frame, missing),
            }


def candidates(
    engines: Mapping[str, Engine], rivals: Mapping[str, TorchRival], frame: np.ndarray
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What can be timed, and what cannot and why."""
    calls: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    for precision, engine in engines.items():
        calls[f"engine {precision}, host to host"] = lambda engine=engine: engine.segment(frame)
        placed = ops.DeviceArray.from_numpy(frame)
        calls[f"engine {precision}, device to device"] = lambda engine=engine, placed=placed: (
            engine.segment_device(placed)
        )
    for precision, rival in rivals.items():
        tensor = rival.place(frame)
        for name, call in (
            (f"torch {precision}, host to host", lambda rival=rival: rival.from_host(frame)),
            (
                f"torch {precision}, device to device",
                lambda rival=rival, tensor=tensor: rival.from_device(tensor),
            ),
        ):
            failure = rival.try_out(call)
            if failure:
                missing[name] = failure
            else:
                calls[name] = call
    return calls, missing


def measure(calls: Mapping[str, Callable[[], Any]], setting: Setting) -> dict[str, dict[str, Any]]:
    """Times, CPU time and launches of every candidate."""
    seconds = CASE_SECONDS
    taken = take_turns_locally(calls, rounds=setting.rounds, plan=PLAN, max_seconds=seconds)
    return {
        name: summarise(taken.warm(name)) | {"launches": count_launches(call, setting.torch_device)}
        for name, call in calls.items()
    }


def summarise(samples: list[Sample]) -> dict[str, Any]:
    """Milliseconds of wall and CPU time a frame."""
    wall = [sample.wall_ms for sample in samples]
    return {
        "p50_ms": statistics.median(wall),
        "p99_ms": float(np.percentile(wall, 99)),
        "cpu_ms": statistics.fmean(sample.cpu_ms for sample in samples),
        "calls": len(wall),
    }


def count_launches(call: Callable[[], Any], device: str) -> int | str:
    """Kernels that one call runs on the GPU, ours and others', as CUPTI tells torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device == "cpu":
        return "missing: no GPU that torch sees"
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    on_gpu = [
        event
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return len(on_gpu) or "missing: CUPTI told of no kernel"


def agreement(
    engines: Mapping[str, Engine],
    rivals: Mapping[str, TorchRival],
    frame: np.ndarray,
    missing: Mapping[str, str],
) -> dict[str, float]:
    """Share of pixels to which the engine and torch of its precision give the same label."""
    shares = {}
    for precision, engine in engines.items():
        if f"torch {precision}, host to host" not in missing:
            theirs = rivals[precision].from_host(frame)
            shares[precision] = float((engine.segment(frame).labels == theirs).mean())
    return shares


def measure_swaps(engine: Engine, text: np.ndarray, setting: Setting) -> dict[str, float]:
    """Median milliseconds of naming classes whose embeddings are at hand, the next frame apart."""
    medians, frame = {}, random_frame(setting.sizes_hw[0])
    for count in setting.class_counts:
        taken = []
        for turn in range(SWAPS):
            rows = np.ascontiguousarray(np.roll(text[:count], turn, axis=0))
            watch = Stopwatch()
            engine.set_classes(class_names(count), embeddings=rows)
            taken.append(watch.seconds * 1e3)
            engine.segment(frame)
        medians[str(count)] = statistics.median(taken)
    return medians


class TorchRival:
    """Eager torch from frame to labels.

    Args:
        model: A ZegCLIP model in float32.
        precision: What the model, the upsampling and the activation compute in.
        device: Where.
    """

    def __init__(self, model: Any, precision: str, device: str) -> None:
        import copy

        import torch

        from zsseg_rt.models.descriptor.model import IMAGE_MEAN, IMAGE_STD

        self._torch, self._device = torch, torch.device(device)
        self._dtype = getattr(torch, precision)
        self._model = copy.deepcopy(model).to(device=device, dtype=self._dtype).eval()
        side = model.config.image_size
        self._size_hw = (side, side)
        self._mean, self._std = (
            torch.tensor(values, device=device).reshape(3, 1, 1)
            for values in (IMAGE_MEAN, IMAGE_STD)
        )
        self._seen = list(model.config.seen_classes)
        self._bias = model.config.seen_bias
        self._text = self._bias_of_class = None

    def set_classes(self, text: np.ndarray) -> None:
        """Place the text embeddings [C, D]."""
        torch = self._torch
        self._text = torch.from_numpy(text).to(device=self._device, dtype=self._dtype)
        bias = torch.zeros(len(text), 1, 1, dtype=self._dtype)
        bias[self._seen] = self._bias
        self._bias_of_class = bias.to(self._device)

    def place(self, frame: np.ndarray) -> Any:
        """Copy a frame to the device."""
        return self._torch.from_numpy(frame).to(self._device)

    def from_host(self, frame: np.ndarray) -> np.ndarray:
        """Labels in host memory of a frame in host memory."""
        labels: np.ndarray = self._label(self.place(frame)).cpu().numpy()
        return labels

    def from_device(self, frame: Any) -> Any:
        """Labels on the device of a frame there; returns once they are."""
        labels = self._label(frame)
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)
        return labels

    def try_out(self, call: Callable[[], Any]) -> str:
        """Call once; returns why it is impossible, or ""."""
        try:
            call()
        except self._torch.OutOfMemoryError:
            self._torch.cuda.empty_cache()
            return "out of memory"
        return ""

    def _label(self, frame: Any) -> Any:
        torch = self._torch
        functional = torch.nn.functional
        with torch.inference_mode(), exact_float32(torch, self._device):
            planes = frame.permute(2, 0, 1)[None].float()
            resized = functional.interpolate(planes, self._size_hw, mode="bilinear")[0]
            image = ((resized / 255 - self._mean) / self._std)[None].to(self._dtype)
            logits = self._model(image, self._text).mask_logits
            full = functional.interpolate(logits, tuple(frame.shape[:2]), mode="bilinear")[0]
            best = (full.sigmoid() - self._bias_of_class).argmax(0)
            kind = torch.uint8 if len(self._text) <= 254 else torch.int32
            return best.to(kind)


@contextmanager
def exact_float32(torch: Any, device: Any) -> Iterator[None]:
    """No TF32 in matrix products and convolutions: float32 is compared with float32."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def free_bytes(device: str) -> int | None:
    """Free memory of the GPU, what torch only keeps for later not counted as used."""
    import torch

    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def read_gpu() -> Any:
    """Driver, clocks and power now, as gpu_check.sh records them."""
    sys.path.insert(0, str(ROOT / "tools" / "gpu_check"))
    try:
        import gpu_processes
    finally:
        del sys.path[0]
    return gpu_processes.read_gpu()


def class_names(count: int) -> list[str]:
    """Names for random embeddings."""
    return [f"class {index}" for index in range(count)]


def set_classes(engine: Engine, text: np.ndarray, count: int) -> None:
    """Name the first classes."""
    engine.set_classes(class_names(count), embeddings=np.ascontiguousarray(text[:count]))


def random_text(embed_dim: int, count: int) -> np.ndarray:
    """Unit rows float32 [count, embed_dim]."""
    rows = np.random.default_rng(0).standard_normal((count, embed_dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_frame(size_hw: tuple[int, int]) -> np.ndarray:
    """A smooth frame uint8 [H, W, 3]."""
    planes = np.random.default_rng(0).uniform(0, 255, (1, 3, 12, 16)).astype(np.float32)
    return np.ascontiguousarray(
        reference.upsample_bilinear(planes, size_hw)[0].transpose(1, 2, 0).astype(np.uint8)
    )
