"""What there is to check."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_processes import ROOT, Step, last_line, run_python, run_quietly

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# A test file holds GPU tests if it names the mark, or uses the fixture that runs on both devices.
GPU_TESTS = re.compile(r"needs_cuda|\bdevice\.(place|holds)\(")
ENGINE_TESTS = "test_gpu_engine.py"
# What the engine needs of torch and ONNX on the GPU, or the reason why it cannot have it.
TORCH_FACTS = """
import torch
try:
    import onnx
except ImportError as exc:
    raise SystemExit(f"needs the package onnx: {exc}")
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no GPU: it needs a CUDA build of torch")
"""


def build_tree() -> Path:
    """Where setup.py builds; the program for the sanitizer is built from the same objects."""
    name = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return ROOT / "build" / name


def build_steps(work: Path) -> list[Step]:
    """The extension for this GPU, then the program that launches every kernel."""
    environment = {"ZSSEG_CUDA": "ON", "ZSSEG_WERROR": "1"}
    environment["CMAKE_ARGS"] = "-DZSSEG_BUILD_CUDA_TESTS=ON " + os.environ.get("CMAKE_ARGS", "")
    capability = run_quietly("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = re.match(r"(\d+)\.(\d+)\s", f"{capability or ''}\n")
    if found:
        environment["ZSSEG_CUDA_ARCHITECTURES"] = "".join(found.groups())
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    program = ["cmake", "--build", build_tree(), "--target", "zsseg_cuda_tests", "--parallel"]
    return [
        Step(name="build", command=build, environment=environment, limit=240.0),
        Step(name="build program", command=program, limit=60.0),
    ]


def check_steps(args: argparse.Namespace, work: Path) -> Iterator[Step]:
    """Everything that runs on the GPU, cheapest first."""
    program = args.program or build_tree() / "zsseg_cuda_tests"
    no_program = "" if program.is_file() else "no zsseg_cuda_tests, which is built with nvcc"
    # Seconds on a GPU; half a minute of a quiet core on the emulated one.
    yield Step(name="every kernel", command=[program], limit=180.0, missing=no_program)
    yield from sanitizer_steps(program, no_program)
    tests = sorted(str(path.relative_to(ROOT)) for path in gpu_test_files())
    kernel_tests = [name for name in tests if not name.endswith(ENGINE_TESTS)]
    # On an emulated GPU all of them take minutes.
    few = ["-k", "overlay or all_finite or addresses"] if args.quick else []
    yield pytest_step("kernel tests", [*kernel_tests, *few], work, limit=120.0)
    no_engine = why_no_engine()
    engine_tests = [name for name in tests if name.endswith(ENGINE_TESTS)]
    yield pytest_step("engine tests", engine_tests, work, missing=no_engine)
    kernels = [sys.executable, "tools/benchmark_kernels.py", "--device", "cuda"]
    quick = ["--quick", "--op", "overlay", "--op", "all_finite"] if args.quick else []
    yield benchmark_step("kernels", [*kernels, *quick], work)
    engine = [sys.executable, "benchmarks/engine.py", "--device", "cuda"]
    size = ["--size", "tiny"] if args.quick else []
    missing = no_engine or why_no_export()
    yield benchmark_step("engine", [*engine, *size], work, missing=missing)


def sanitizer_steps(program: Path, no_program: str) -> Iterator[Step]:
    """The program under each tool of compute-sanitizer."""
    beside = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, beside)])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    missing = no_program or ("" if sanitizer else "no compute-sanitizer; it is in CUDA's toolkit")
    for tool in SANITIZERS:
        # A poisoned result would hide that a kernel reads what nothing wrote.
        options = ["--unpoisoned"] if tool == "initcheck" else []
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", "9", program, *options]
        yield Step(name=tool, command=command, limit=60.0, missing=missing)


def gpu_test_files() -> list[Path]:
    """Test files that hold tests for a GPU."""
    files = (ROOT / "python_tests").rglob("test_*.py")
    return [path for path in files if GPU_TESTS.search(path.read_text(encoding="utf-8"))]


def pytest_step(
    name: str, files: Sequence[str], work: Path, *, missing: str = "", limit: float = 90.0
) -> Step:
    """GPU tests of some files, none of which may skip for want of a GPU."""
    junit = work / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--nightly", "-m", "needs_cuda"]
    command += ["-p", "no:cacheprovider"]
    return Step(
        name=name,
        command=[*command, f"--junitxml={junit}", *files],
        environment={"ZSSEG_REQUIRE_CUDA": "1"},
        limit=limit,
        missing=missing,
        junit=junit,
    )


def benchmark_step(name: str, command: Sequence[str], work: Path, *, missing: str = "") -> Step:
    """A benchmark that writes JSON, with the GPU's clocks noted meanwhile."""
    file = work / f"{name}.json"
    return Step(
        name=f"{name} benchmark",
        command=[*command, "--json", str(file)],
        limit=120.0,
        missing=missing,
        watched=True,
    )


def why_no_engine() -> str:
    """Why graphs cannot run on this GPU; "" if they can."""
    done = run_python(TORCH_FACTS)
    return "" if done.returncode == 0 else last_line(done.stderr)


def why_no_export() -> str:
    """Why the benchmark's model cannot be exported; "" if it can."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"needs the package {absent[0]} to export a model" if absent else ""
