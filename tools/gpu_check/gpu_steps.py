"""The steps of a check, the most telling first."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gpu_processes import ROOT, SECONDS, Step, run_quietly, why_python_fails

HERE = Path(__file__).resolve().parent
QUICK_PATIENCE = 4.0
TEGRA_PATIENCE = 3.0
TEGRA_RELEASE = Path("/etc/nv_tegra_release")
FLAVOURS = ("tensorrt", "tensorrt_rtx")
# A test file holds GPU tests if it names the mark, or uses the fixture that runs on both devices.
GPU_TESTS = re.compile(r"needs_cuda|\bdevice\.(place|holds)\(|\bdef test_\w+\(device\b")
ENGINE_TESTS = "test_gpu_engine.py"
QUICK_TESTS = ("test_ops_laws.py",)
# What the engine needs of torch on the GPU, or the reason why it cannot have it.
TORCH_FACTS = """
try:
    import torch
except ImportError as exc:
    raise SystemExit(f"needs the package torch: {exc}")
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no GPU: it needs a CUDA build of torch")
"""
TENSORRT_FACTS = """
from zsseg_rt.backends._tensorrt_api import load_tensorrt
load_tensorrt()
"""


def build_tree() -> Path:
    """Where setup.py builds; the program for the sanitizer is built from the same objects."""
    name = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return ROOT / "build" / name


def build_steps(args: argparse.Namespace) -> list[Step]:
    """The extension for this GPU, then the program that launches every kernel."""
    environment = {"ZSSEG_CUDA": "ON", "ZSSEG_WERROR": "1"}
    environment["CMAKE_ARGS"] = "-DZSSEG_BUILD_CUDA_TESTS=ON " + os.environ.get("CMAKE_ARGS", "")
    capability = run_quietly("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    version = re.match(r"(\d+)\.(\d+)\s", f"{capability or ''}\n")
    if version:
        environment["ZSSEG_CUDA_ARCHITECTURES"] = "".join(version.groups())
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    program = ["cmake", "--build", build_tree(), "--target", "zsseg_cuda_tests", "--parallel"]
    steps = [
        Step(name="build", command=build, environment=environment, limit=300.0, keeps=False),
        Step(name="build program", command=program, limit=120.0, keeps=False),
    ]
    return [patient(step) for step in steps]


def patient(step: Step) -> Step:
    """The step, with three times its limit on a Tegra: a board's CPU and GPU take longer."""
    step.limit *= TEGRA_PATIENCE if TEGRA_RELEASE.exists() else 1.0
    return step


def check_steps(args: argparse.Namespace) -> Iterator[Step]:
    """Everything that runs on the GPU; where time runs out, the last ones give way."""
    for name, steps in GROUPS.items():
        for step in steps(args) if not args.only or name in args.only else ():
            if args.quick:  # tiny work, but maybe on an emulated GPU
                step.limit *= QUICK_PATIENCE
            yield patient(step)


def plan_steps(args: argparse.Namespace) -> Iterator[Step]:
    """Do TensorRT's plans build? Before any step that is timed, which finds them in the cache."""
    options = ["--quick"] if args.quick else ["--bundle", args.model] if args.model else []
    for backend, flavour, missing in backends():
        if backend not in FLAVOURS:
            continue
        for precision in ("float16", "float32"):
            name = f"plans {precision} {backend}"
            command = [HERE / "gpu_frames.py", "--plans", precision, *options]
            yield script_step(name, command, args, flavour, missing, 600.0)


def kernel_steps(args: argparse.Namespace) -> Iterator[Step]:
    """Are the kernels right?"""
    # Seconds on a GPU; half a minute of a quiet core on the emulated one.
    yield Step(name="every kernel", command=[program(args)], limit=120.0, missing=no_program(args))
    tests = [name for name in test_names() if not name.endswith(ENGINE_TESTS)]
    if args.quick:  # on an emulated GPU all of them take minutes
        tests = [name for name in tests if name.endswith(QUICK_TESTS)]
    yield pytest_step("kernel tests", tests, args)


def engine_steps(args: argparse.Namespace) -> Iterator[Step]:
    """Does each backend label frames rightly, recorded and in two lanes?"""
    model = ["--bundle", args.model] if args.model else []
    options = ["--quick"] if args.quick else model
    for backend, flavour, missing in backends():
        command = [HERE / "gpu_frames.py", *options]
        yield script_step(f"frames {backend}", command, args, flavour, missing, 180.0)
    for backend, flavour, missing in backends():
        command = [HERE / "gpu_stream.py", *(["--quick"] if args.quick else [])]
        missing = missing or why_no_streams()
        yield script_step(f"stream {backend}", command, args, flavour, missing, 120.0)
    tests = [name for name in test_names() if name.endswith(ENGINE_TESTS)]
    yield pytest_step("engine tests", tests, args, missing=why_no_torch())


def time_steps(args: argparse.Namespace) -> Iterator[Step]:
    """How long does a frame take, beside torch?"""
    tiny = ["--size", "tiny", "--rounds", "1"] if args.quick else []
    for backend, flavour, missing in backends():
        against = "eager" if backend == "torch" and not args.quick else "none"
        command = [ROOT / "benchmarks" / "engine.py", "--against", against]
        command += ["--bundle", args.model or "", *tiny]
        missing = missing or why_no_benchmarks() or no_model(args)
        yield script_step(f"frame times {backend}", command, args, flavour, missing, 150.0)
    if not args.quick:
        command = [ROOT / "benchmarks" / "engine.py", "--against", "compiled"]
        command += ["--bundle", args.model or ""]
        missing = why_no_torch() or why_no_benchmarks() or no_model(args)
        yield script_step("compiled frame times torch", command, args, "torch", missing, 120.0)


def kernel_time_steps(args: argparse.Namespace) -> Iterator[Step]:
    """How long do kernels take, beside their floors and rivals?"""
    command = [ROOT / "tools" / "benchmark_kernels.py", "--device", "cuda"]
    quick = ["--quick", "--op", "overlay", "--op", "all_finite"] if args.quick else []
    yield script_step("kernel times", [*command, *quick], args, None, why_no_benchmarks(), 240.0)


def profile_steps(args: argparse.Namespace) -> Iterator[Step]:
    """NVIDIA's profilers on one frame, and on five kernels."""
    quick = ["--quick"] if args.quick else []
    base = [sys.executable, HERE / "gpu_profile.py", "--scratch", args.work]
    nsys, no_nsys = find_tool("nsys", "Nsight Systems")
    for backend, flavour, missing in backends():
        options = ["--bundle", args.model or "", "--backend", flavour, *quick]
        name, other = f"one frame in nsys, {backend}", f"one frame in torch's profiler, {backend}"
        plain = [sys.executable, HERE / "gpu_target.py", "frame", "--json", result(args, other)]
        within = [*base, "--nsys", nsys, "--json", result(args, name)]
        missing = missing or why_no_benchmarks() or no_model(args)
        environment = engine_environment(args, backend)
        yield Step(name=other, command=[*plain, *options], limit=60.0,
                   missing=missing or why_no_torch(), environment=environment)  # fmt: skip
        yield Step(name=name, command=[*within, *options], limit=90.0,
                   missing=missing or no_nsys, environment=environment)  # fmt: skip
    tool, absent = find_tool("ncu", "Nsight Compute")
    command = [*base, "--ncu", tool, "--json", result(args, "kernels in ncu"), *quick]
    missing = absent or why_no_benchmarks()
    yield Step(name="kernels in ncu", command=command, limit=150.0, missing=missing)


def sanitizer_steps(args: argparse.Namespace) -> Iterator[Step]:
    """The program under the tools of compute-sanitizer that tell most."""
    yield from sanitizers(args, "memcheck", "racecheck")


def sweep_steps(args: argparse.Namespace) -> Iterator[Step]:
    """Which settings are best here?"""
    quick = ["--quick"] if args.quick else []
    model = ["--bundle", args.model] if args.model else []
    for backend, flavour, missing in backends():
        command = [HERE / "gpu_sweeps.py", *quick, *model]
        missing = missing or why_no_benchmarks()
        yield script_step(f"sweeps {backend}", command, args, flavour, missing, 90.0)


def other_sanitizer_steps(args: argparse.Namespace) -> Iterator[Step]:
    """The sanitizer's other tools."""
    yield from sanitizers(args, "initcheck", "synccheck")


GROUPS: dict[str, Callable[[argparse.Namespace], Iterator[Step]]] = {
    "plans": plan_steps,
    "kernels": kernel_steps,
    "engine": engine_steps,
    "times": time_steps,
    "kernel-times": kernel_time_steps,
    "profiles": profile_steps,
    "sanitizers": sanitizer_steps,
    "sweeps": sweep_steps,
    "other-sanitizers": other_sanitizer_steps,
}


def program(args: argparse.Namespace) -> Path:
    """The program that launches every kernel."""
    return Path(args.program or build_tree() / "zsseg_cuda_tests")


def no_program(args: argparse.Namespace) -> str:
    """Why it cannot run; "" if it can."""
    return "" if program(args).is_file() else "no zsseg_cuda_tests, which is built with nvcc"


def no_model(args: argparse.Namespace) -> str:
    """Why the large model is missing; "" if it is there."""
    if args.model is not None:
        return ""
    return "no models: run tools/gpu_check/prepare.sh on any computer and bring its folder here"


def result(args: argparse.Namespace, name: str) -> Path:
    """Where a step keeps what it found."""
    return Path(args.work) / "results" / f"{name}.json"


def engine_environment(args: argparse.Namespace, backend: str) -> dict[str, str]:
    """Plans are kept between steps and calls; two flavours of TensorRT may be installed."""
    flavour = {"ZSSEG_TENSORRT": backend} if backend in FLAVOURS else {}
    return {"ZSSEG_HOME": str(Path(args.work) / "home"), **flavour}


def script_step(
    name: str,
    command: Sequence[str | Path],
    args: argparse.Namespace,
    backend: str | None,
    missing: str,
    limit: float,
) -> Step:
    """A script that keeps its results as it goes, with the GPU's clocks noted meanwhile."""
    engine_options = [] if backend is None else ["--backend", backend]
    outputs = ["--seconds", SECONDS, "--json", result(args, name)]
    return Step(
        name=name,
        command=[sys.executable, *command, *engine_options, *outputs],
        environment=engine_environment(args, name.split()[-1]),
        limit=limit,
        missing=missing,
        watched=True,
    )


def pytest_step(
    name: str, files: Sequence[str], args: argparse.Namespace, *, missing: str = ""
) -> Step:
    """GPU tests of some files, none of which may skip for want of a GPU."""
    junit = Path(args.work) / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--nightly", "-m", "needs_cuda"]
    command += ["-p", "no:cacheprovider"]
    return Step(
        name=name,
        command=[*command, f"--junitxml={junit}", *files],
        environment={"ZSSEG_REQUIRE_CUDA": "1", **engine_environment(args, "")},
        limit=120.0,
        missing=missing or why_python_fails("import pytest"),
        junit=junit,
    )


def sanitizers(args: argparse.Namespace, *tools: str) -> Iterator[Step]:
    """The program under tools of compute-sanitizer."""
    sanitizer, absent = find_tool("compute-sanitizer", "the CUDA toolkit")
    for tool in tools:
        # A poisoned result would hide that a kernel reads what nothing wrote.
        options = ["--unpoisoned"] if tool == "initcheck" else []
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", program(args), *options]
        yield Step(name=tool, command=command, limit=150.0, missing=no_program(args) or absent)


def find_tool(name: str, package: str) -> tuple[str, str]:
    """A program of NVIDIA's and "", or "" and why it is missing."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    homes += sorted(Path("/opt/nvidia").glob("nsight-*/*"), reverse=True)
    folders = [str(folder) for home in homes for folder in (home / "bin", home)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    program = shutil.which(name, path=path)
    return (program, "") if program else ("", f"no {name}; it is in {package}")


def test_names() -> list[str]:
    """Test files that hold tests for a GPU, as the checkout names them."""
    return sorted(str(path.relative_to(ROOT)) for path in gpu_test_files())


def gpu_test_files() -> list[Path]:
    """Test files that hold tests for a GPU."""
    files = (ROOT / "python_tests").rglob("test_*.py")
    return [path for path in files if GPU_TESTS.search(path.read_text(encoding="utf-8"))]


def backends() -> Iterator[tuple[str, str, str]]:
    """Name, EngineConfig's word and what is missing of each backend: TensorRT's flavours too."""
    installed = [name for name in FLAVOURS if importlib.util.find_spec(name) is not None]
    for flavour in installed or FLAVOURS[:1]:
        yield flavour, "tensorrt", why_no_tensorrt(flavour)
    yield "torch", "torch", why_no_torch()


@functools.cache
def why_no_benchmarks() -> str:
    """Why benchmarks cannot run; "" if they can: they need OpenCV, which checks do not."""
    return why_python_fails("import zsseg_rt.evaluation.provenance")


@functools.cache
def why_no_streams() -> str:
    """Why no video can be labelled and painted; "" if one can."""
    return why_python_fails("import av, cv2")


@functools.cache
def why_no_torch() -> str:
    """Why torch cannot run graphs on this GPU; "" if it can."""
    return why_python_fails(TORCH_FACTS)


@functools.cache
def why_no_tensorrt(flavour: str) -> str:
    """Why TensorRT cannot be used; "" if it can."""
    return why_python_fails(TENSORRT_FACTS, ZSSEG_TENSORRT=flavour)
