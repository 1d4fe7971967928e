#!/usr/bin/env bash
# Checks everything that needs a GPU and records the outcome. Needs no network: the Python packages
# (those of tools/test.sh, with a CUDA build of torch) and nvcc must be there.
#
#   bash tools/gpu_check.sh
#
# Builds for this GPU, runs the C++ tests, every CUDA test of the Python suite and the engine on the
# GPU, then the kernel benchmark, and writes benchmarks/results/<gpu>-<date>.json.
#
# ZSSEG_PYTHON=EXE  interpreter (default: python3)
# Exit codes: 0 all passed, 1 something failed (the record says what), 4 no GPU or no nvcc.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${ZSSEG_PYTHON:-python3}
say() { printf '\n== %s\n' "$*"; }
give_up() {
  echo "gpu_check: $*" >&2
  exit 4
}

# nvidia-smi where there is one; a Jetson has no complete one but is known by its release file.
if ! nvidia-smi -L >/dev/null 2>&1 && [ ! -e /etc/nv_tegra_release ]; then
  give_up "no NVIDIA GPU or driver here: nothing was checked. Run this on a computer with a GPU."
fi
command -v nvcc >/dev/null || [ -n "${CUDACXX:-}" ] ||
  give_up "nvcc was not found. Put it on PATH (often /usr/local/cuda/bin) or set CUDACXX."

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
if [[ $capability =~ ^[0-9]+\.[0-9]+$ ]]; then
  export ZSSEG_CUDA_ARCHITECTURES=${capability/./}
fi
export ZSSEG_CUDA=ON ZSSEG_WERROR=1 ZSSEG_REQUIRE_CUDA=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

failed=()
step() { # name, command...: runs it, remembers a failure and goes on
  local name=$1
  shift
  say "$name"
  "$@" || failed+=("$name")
}

say "build"
"$python" setup.py build_ext --inplace || exit 1
cmake -S . -B build/gpu_check -DCMAKE_BUILD_TYPE=Release -DZSSEG_CUDA=ON -DZSSEG_BUILD_TESTS=ON \
  -DZSSEG_BUILD_PYTHON=OFF -DZSSEG_BUILD_EMULATED_GPU=OFF \
  ${ZSSEG_CUDA_ARCHITECTURES:+-DZSSEG_CUDA_ARCHITECTURES="$ZSSEG_CUDA_ARCHITECTURES"} &&
  cmake --build build/gpu_check --parallel || exit 1
"$python" -c 'import sys; from zsseg_rt import ops; sys.exit(ops.cuda_device_count() == 0)' ||
  give_up "this build sees no CUDA device; the driver may be older than nvcc's CUDA."

step "cpp tests" ctest --test-dir build/gpu_check --output-on-failure \
  --output-junit "$work/cpp.xml"
step "cuda tests" "$python" -m pytest -q -m needs_cuda python_tests \
  --ignore-glob='*test_gpu_*' --junitxml="$work/cuda.xml"
engine_tests=(python_tests/test_gpu_*.py)
step "engine tests" "$python" -m pytest -q "${engine_tests[@]}" --junitxml="$work/engine.xml"
step "kernel benchmark" "$python" tools/benchmark_kernels.py --json "$work/benchmarks.json"

say "record"
"$python" - "$work" "${failed[@]}" <<'PYTHON' || exit 1
import datetime
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from zsseg_rt import ops

work, failed = Path(sys.argv[1]), sys.argv[2:]


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def counts(report):
    if not report.is_file():
        return None
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total = {key: sum(int(suite.get(key) or 0) for suite in suites)
             for key in ("tests", "failures", "errors", "skipped")}
    return total


properties = ops.cuda_device_properties(0)
driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
now = datetime.datetime.now(datetime.timezone.utc)
benchmarks = work / "benchmarks.json"
record = {
    "gpu": properties["name"],
    "compute_capability": properties["compute_capability"],
    "driver": driver.splitlines()[0] if driver else None,
    "cuda_runtime": ops.cuda_runtime_version(),
    "commit": output_of("git", "rev-parse", "HEAD"),
    "dirty": bool(output_of("git", "status", "--porcelain", "--untracked-files=no")),
    "date": now.isoformat(timespec="seconds"),
    "passed": not failed,
    "failed_steps": failed,
    "tests": {name: counts(work / f"{name}.xml") for name in ("cpp", "cuda", "engine")},
    "benchmarks": json.loads(benchmarks.read_text()) if benchmarks.is_file() else None,
}
gpu = re.sub(r"[^a-z0-9]+", "-", properties["name"].lower()).strip("-")
target = Path("benchmarks/results") / f"{gpu}-{now:%Y-%m-%d}.json"
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(json.dumps(record, indent=2) + "\n")
print(f"wrote {target}")
PYTHON

if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu_check: failed: %s\n' "${failed[*]}" >&2
  exit 1
fi
echo "gpu_check: all passed"
