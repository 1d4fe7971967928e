#!/usr/bin/env bash
# Sets up everything that testing needs, then lints, type-checks and runs the C++ and Python tests.
#
#   bash tools/test.sh [pytest arguments; -n 0 runs one test at a time, as --pdb needs]
#
# ZSSEG_VENV=DIR    virtual environment to make or reuse (default: .venv in the project)
# ZSSEG_PYTHON=EXE  interpreter for a new environment (default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${ZSSEG_VENV:-$PWD/.venv}
needed_gb=10 # torch with its CUDA libraries is 6 of them
say() { printf '\n== %s\n' "$*"; }

say "system packages"
missing=()
command -v c++ >/dev/null || missing+=(g++)
[ -e /usr/include/gtest/gtest.h ] || missing+=(libgtest-dev)
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ]; then
    echo "Missing: ${missing[*]}. Run: sudo apt-get install ${missing[*]}" >&2
    exit 4
  fi
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q "${missing[@]}"
fi

say "Python environment in $venv"
if [ ! -x "$venv/bin/python" ]; then
  free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
  if [ "$free_gb" -lt "$needed_gb" ]; then
    echo "A new environment and the tests need $needed_gb GB, and $PWD has $free_gb GB free." \
      "Free some, or name an environment that exists: ZSSEG_VENV=DIR bash tools/test.sh" >&2
    exit 4
  fi
  "${ZSSEG_PYTHON:-python3}" -m venv "$venv"
fi
export PATH="$venv/bin:$PATH"
python -m pip install -q --disable-pip-version-check --upgrade pip
# What pyproject.toml requires to build: the package is built without an environment of its own.
python -m pip install -q --disable-pip-version-check \
  "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.22"
# The package with every extra that tests use; CUDA code for few GPUs keeps the build short. Built
# with the environment's own tools, so that the C++ tests can go on from what is compiled here.
rtx=()
[ "$(uname -m)" = x86_64 ] && rtx=("tensorrt-rtx-cu13>=1.7,<2")
ZSSEG_WERROR=1 ZSSEG_CUDA_ARCHITECTURES="${ZSSEG_CUDA_ARCHITECTURES:-86}" \
  python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]' "${rtx[@]}"
python tools/fetch_tensorrt_bindings.py

say "lint and types"
ruff check .
ruff format --check .
lint-imports --no-cache --no-logo
mypy
git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'cpp_tests/*.cpp' 'cpp_tests/*.h' |
  xargs clang-format --dry-run -Werror

say "C++ tests"
build=build/$(python -c 'import sys, sysconfig
print(f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")')
cmake -S . -B "$build" -DZSSEG_BUILD_TESTS=ON >/dev/null
cmake --build "$build"
ctest --test-dir "$build" --output-on-failure

# Two files of tests at a time, on machines of any size: each may hold a few GB.
at_once=(-n 2 --dist loadfile)
say "Python tests"
python -m pytest "${at_once[@]}" "$@"

if [ $# = 0 ]; then
  say "CUDA tests on an emulated GPU"
  ZSSEG_EXTENSION=$(ls "$PWD/$build"/cpp_tests/cuda_emulation/_C*) ZSSEG_REQUIRE_CUDA=1 \
    python -m pytest -q "${at_once[@]}" -m needs_cuda python_tests --ignore-glob='*test_gpu_*'
fi
