#!/usr/bin/env bash
# Sets up everything that testing needs, then lints, type-checks and runs the C++ and Python tests.
#
#   bash tools/test.sh [pytest arguments; -n 0 runs one test at a time, as --pdb needs]
#
# As root it installs the system packages that are missing. What tests of streams and of the browser
# page need may be absent; those tests are skipped then. Where all of it is there, none may be.
#
# ZSSEG_VENV=DIR    virtual environment to make or reuse (default: .venv in the project)
# ZSSEG_PYTHON=EXE  interpreter for a new environment (default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${ZSSEG_VENV:-$PWD/.venv}
needed_gb=10 # torch with its CUDA libraries is 6 of them
say() { printf '\n== %s\n' "$*"; }

# An RTSP server and GStreamer's Python for tests of cameras; a browser and its font for the page.
stream_packages=(
  gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0 python3-gi python3-gst-1.0
  gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad
  gstreamer1.0-plugins-ugly gstreamer1.0-libav
  libgirepository1.0-dev libcairo2-dev pkg-config python3-dev gcc
  chromium-headless-shell fonts-dejavu-core
)

absent() { # package...: prints those that are not installed
  local package
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status} ' "$package" 2>/dev/null) == installed* ]] ||
      printf '%s\n' "$package"
  done
}

install_what_apt_has() { # package...: one that apt does not have keeps no other from being installed
  local package known=()
  apt-get update -q || return 0
  for package in "$@"; do
    ! apt-cache show "$package" >/dev/null 2>&1 || known+=("$package")
  done
  [ ${#known[@]} = 0 ] ||
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${known[@]}" ||
    true
}

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
mapfile -t missing < <(absent "${stream_packages[@]}")
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  install_what_apt_has "${missing[@]}"
  mapfile -t missing < <(absent "${stream_packages[@]}")
fi
skipped=()
if [ ${#missing[@]} -gt 0 ]; then
  skipped+=("sudo apt-get install --no-install-recommends ${missing[*]}")
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
# JetPack 6's compiler, without its toolkit, and its headers: 25 MB.
cuda12=("nvidia-cuda-nvrtc-cu12==12.6.*" "nvidia-cuda-runtime-cu12==12.6.*")
ZSSEG_WERROR=1 ZSSEG_CUDA_ARCHITECTURES="${ZSSEG_CUDA_ARCHITECTURES:-86}" \
  python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]' "${rtx[@]}" "${cuda12[@]}"
python tools/fetch_tensorrt_bindings.py
# The oldest PyAV that pyproject.toml allows, beside the newest, for test_stream_widths.py.
oldest_pyav=$PWD/build/pyav-15
if [ -d "$oldest_pyav/av" ] || python -m pip install -q --disable-pip-version-check --no-deps \
  --only-binary :all: --target "$oldest_pyav" "av==15.0.*"; then
  export ZSSEG_OLDEST_PYAV=$oldest_pyav
fi
# GStreamer in the tests' own process. Newer ones need girepository-2.0, which old systems lack.
gobject="PyGObject<3.52"
has_gstreamer() {
  python -c 'import gi; gi.require_version("Gst", "1.0"); from gi.repository import Gst' 2>/dev/null
}
if ! has_gstreamer; then
  python -m pip install -q --disable-pip-version-check "$gobject" || true
  has_gstreamer || skipped+=("$venv/bin/pip install '$gobject'")
fi
if [ ${#skipped[@]} = 0 ]; then
  export ZSSEG_REQUIRE_STREAMS=1
else
  say "some tests of streams and of the page will be skipped; to run them, install what they need"
  printf '%s\n' "${skipped[@]}"
fi

say "lint and types"
ruff check .
ruff format --check .
lint-imports --no-cache --no-logo
mypy
check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
if command -v zizmor >/dev/null; then # pip has none for aarch64
  zizmor -q --offline .github/workflows
fi
hadolint containers/*.Dockerfile
git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'cpp_tests/*.cpp' 'cpp_tests/*.h' |
  xargs clang-format --dry-run -Werror

say "C++ tests"
build=build/$(python -c 'import sys, sysconfig
print(f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")')
cmake -S . -B "$build" -DZSSEG_BUILD_TESTS=ON >/dev/null
cmake --build "$build"
ctest --test-dir "$build" --output-on-failure --parallel 2
ZSSEG_EMULATED_EXTENSION=$(ls "$PWD/$build"/cpp_tests/cuda_emulation/_C*)
export ZSSEG_EMULATED_EXTENSION

if [ "$(uname -m)" = x86_64 ]; then
  say "C++ tests on an emulated aarch64 CPU"
  code=0
  bash tools/aarch64.sh "$build/aarch64" || code=$?
  case $code in
    0) ;;
    4) echo "skipped: parts are missing" ;;
    *) exit "$code" ;;
  esac
fi

# Two files of tests at a time, on machines of any size: each may hold a few GB.
at_once=(-n 2 --dist loadfile)
say "Python tests"
python -m pytest "${at_once[@]}" "$@"

if [ $# = 0 ]; then
  say "CUDA tests on an emulated GPU"
  ZSSEG_EXTENSION=$ZSSEG_EMULATED_EXTENSION ZSSEG_REQUIRE_CUDA=1 \
    python -m pytest -q "${at_once[@]}" -m needs_cuda python_tests --ignore-glob='*test_gpu_*'
fi
