#!/usr/bin/env bash
# Sets up everything that testing needs, then lints, type-checks and runs the C++ and Python tests.
#
#   bash tools/test.sh [TESTS and pytest's options]
#   bash tools/test.sh --fast [...]       minutes: lint, types, tests that need no torch; installs no more
#   bash tools/test.sh --nightly [...]    also what takes long and rarely breaks
#
# TESTS are files, folders or FILE::TEST. pytest's short options (-k, -m, -n, -x, -q, -v, -s, -p) are
# passed on, and --pdb, --lf, --ff, --sw, --maxfail=N, --durations=N, --tb=STYLE; all else that pytest
# knows goes behind a "--". -n 0 runs one test at a time, as --pdb needs.
#
# As root it installs the system packages that are missing, and upgrades none. What tests of streams and
# of the browser page need may be absent; those tests are skipped then. Where all of it is there, none may
# be. CUDA code is compiled where nvcc is (not with --fast), whether or not there is a GPU.
#
# ZSSEG_VENV=DIR        virtual environment to make or reuse (default: .venv in the project)
# ZSSEG_PYTHON=EXE      interpreter for a new environment (default: python3)
# ZSSEG_CUDA=OFF        compiles no CUDA code
# ZSSEG_TEST_CACHE=DIR  what is kept between runs: figures of kernels, mypy's cache
#                       (default: zsseg_rt_tests in the user's cache folder; it may be deleted)
# Exit codes: 0 all passed, 1 something failed, 2 usage, 4 something that is needed is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' tools/test.sh
}
refuse() { # what was expected and got
  echo "test.sh: $*. bash tools/test.sh --help tells more." >&2
  exit 2
}

mode=whole
pytest=() # what pytest is given
named=    # whether tests are among it
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit ;;
    --fast | --nightly)
      [ $mode = whole ] || [ "$mode" = "${1#--}" ] || refuse "expected --fast or --nightly, got both"
      mode=${1#--}
      ;;
    --)
      shift
      pytest+=("$@")
      break
      ;;
    -[kmnp])
      [ $# -gt 1 ] || refuse "$1: expected a value behind it, got nothing"
      pytest+=("$1" "$2")
      shift
      ;;
    -[kmnp]?* | --pdb | --lf | --ff | --sw | --maxfail=* | --durations=* | --tb=*) pytest+=("$1") ;;
    -*)
      [[ $1 =~ ^-[xqvs]+$ ]] || refuse "$1: expected an option listed there (pytest's others behind --)"
      pytest+=("$1")
      ;;
    *)
      [ -e "${1%%::*}" ] || refuse "$1: expected a file or folder of tests, found none"
      named=yes
      pytest+=("$1")
      ;;
  esac
  shift
done
set -- "${pytest[@]}"
export ZSSEG_TEST_CACHE=${ZSSEG_TEST_CACHE-${XDG_CACHE_HOME:-${HOME:-$PWD/build}/.cache}/zsseg_rt_tests}
venv=${ZSSEG_VENV:-$PWD/.venv}
stamp=$venv/installed_for_tests
# What is there: nothing, what --fast needs, or all. An environment that has all of it keeps it.
installs=whole
[ "$mode" != fast ] || grep -qs '^whole ' "$stamp" || installs=fast
needed_gb=10 # torch with its CUDA libraries is 6 of them
[ $installs = whole ] || needed_gb=2
say() { printf '\n== %s\n' "$*"; }

# An RTSP server and GStreamer's Python for tests of cameras; a browser and its font for the page.
stream_packages=(
  gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0 python3-gi python3-gst-1.0
  gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad
  gstreamer1.0-plugins-ugly gstreamer1.0-libav
  libgirepository1.0-dev libcairo2-dev pkg-config python3-dev gcc
  chromium-headless-shell fonts-dejavu-core
)
[ $installs = whole ] || stream_packages=()

absent() { # package...: prints those that are not installed
  local package
  for package in "$@"; do
    [[ $(dpkg-query -W -f='${db:Status-Status} ' "$package" 2>/dev/null) == installed* ]] ||
      printf '%s\n' "$package"
  done
}

apt_install() { # package...: names them, then installs them; none that is there becomes another
  echo "Installing, with what they depend on: $*"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends --no-upgrade "$@"
}

install_what_apt_has() { # package...: one that apt does not have keeps no other from being installed
  local package known=()
  echo "Missing: $*"
  apt-get update -q || return 0
  for package in "$@"; do
    ! apt-cache show "$package" >/dev/null 2>&1 || known+=("$package")
  done
  [ ${#known[@]} = 0 ] || apt_install "${known[@]}" || true
}

say "system packages"
missing=()
command -v c++ >/dev/null || missing+=(g++)
[ $installs = fast ] || [ -e /usr/include/gtest/gtest.h ] || missing+=(libgtest-dev)
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Missing: ${missing[*]}. Run: sudo apt-get install --no-upgrade ${missing[*]}" >&2
    exit 4
  fi
  apt-get update -q
  apt_install "${missing[@]}"
fi
mapfile -t missing < <(absent "${stream_packages[@]}")
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  install_what_apt_has "${missing[@]}"
  mapfile -t missing < <(absent "${stream_packages[@]}")
fi
skipped=()
if [ ${#missing[@]} -gt 0 ]; then
  skipped+=("sudo apt-get install --no-install-recommends --no-upgrade ${missing[*]}")
else
  echo "all there"
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
build=build/$(python -c 'import sys, sysconfig
print(f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")')
export ZSSEG_CUDA_ARCHITECTURES=${ZSSEG_CUDA_ARCHITECTURES:-86} # few, which keeps the build short
if [ $installs = fast ]; then
  export ZSSEG_CUDA=OFF
elif [ -z "${ZSSEG_CUDA:-}" ] && command -v "${CUDACXX:-nvcc}" >/dev/null; then
  export ZSSEG_CUDA=ON # asked for, so that it is compiled without a GPU too
fi

# What is installed, and a hash of all that decides it, for which interpreter and checkout.
what_is_installed() {
  local files=(pyproject.toml setup.py CMakeLists.txt tools/test.sh tools/machines/fetch_tensorrt_bindings.py)
  {
    printf '%s\n' "$PWD" "$ZSSEG_CUDA_ARCHITECTURES" "${ZSSEG_CUDA:-}" "${CMAKE_ARGS:-}"
    python -VV
    find csrc cpp_tests "${files[@]}" -type f -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum | sed "s/^/$installs /"
}

pip_install() { # pip's words on the way, but for its many lines on files and on what is there already
  python -m pip install --disable-pip-version-check "$@" |
    sed -u '/^Requirement already\|^Looking in\|^ *\(adding\|changing\|copying\|creating\|reading\|writing\) /d'
}

install_package() {
  # What pyproject.toml requires to build: the package is built without an environment of its own.
  pip_install "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.22" # older setuptools need wheel
  # The package with what the tests use. Built with the environment's own tools, so that the C++ tests
  # can go on from what is compiled here.
  export ZSSEG_WERROR=1
  if [ $installs = fast ]; then
    pip_install -v --no-build-isolation -e '.[test]'
    return
  fi
  pip_install --upgrade pip
  local rtx=()
  [ "$(uname -m)" = x86_64 ] && rtx=("tensorrt-rtx-cu13>=1.7,<2")
  # JetPack 6's compiler, without its toolkit, and its headers: 25 MB.
  local cuda12=("nvidia-cuda-nvrtc-cu12==12.6.*" "nvidia-cuda-runtime-cu12==12.6.*")
  pip_install -v --no-build-isolation -e '.[dev]' "${rtx[@]}" "${cuda12[@]}"
  python tools/machines/fetch_tensorrt_bindings.py
}

wanted=$(what_is_installed)
extension=(zsseg_rt/_C.*.so)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -e "${extension[0]}" ] &&
  [ -e "$build/CMakeCache.txt" ]; then
  echo "nothing that is installed or compiled has changed"
else
  rm -f "$stamp"
  install_package
  echo "$wanted" >"$stamp"
fi
prepare_streams() { # what some tests of cameras and videos take
  # The oldest PyAV that pyproject.toml allows, beside the newest, for test_stream_video.py.
  local oldest_pyav=$PWD/build/pyav-15 gobject="PyGObject<3.52" # newer ones need girepository-2.0
  if [ -d "$oldest_pyav/av" ] ||
    pip_install --no-deps --only-binary :all: --target "$oldest_pyav" "av==15.0.*"; then
    export ZSSEG_OLDEST_PYAV=$oldest_pyav
  fi
  # An OpenCV 4, as Jetsons have it, beside the newest, for test_photos.py.
  local opencv_4=$PWD/build/opencv-4
  if [ -d "$opencv_4/cv2" ] ||
    pip_install --no-deps --only-binary :all: --target "$opencv_4" "opencv-python-headless>=4.8,<5"; then
    export ZSSEG_OPENCV_4=$opencv_4
  fi
  # GStreamer in the tests' own process.
  if ! has_gstreamer; then
    pip_install "$gobject" || true
    has_gstreamer || skipped+=("$venv/bin/pip install '$gobject'")
  fi
  if [ ${#skipped[@]} = 0 ]; then
    export ZSSEG_REQUIRE_STREAMS=1
  else
    say "some tests of streams and of the page will be skipped; to run them, install what they need"
    printf '%s\n' "${skipped[@]}"
  fi
}
has_gstreamer() {
  python -c 'import gi; gi.require_version("Gst", "1.0"); from gi.repository import Gst' 2>/dev/null
}
[ $installs = fast ] || prepare_streams

types() { # without torch: all but the rooms that import it
  local config=pyproject.toml
  if ! python -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("torch"))'; then
    echo "(without torch: export, models, torch_files, training and backend torch are left out)"
    config=build/types_without_torch.toml
    awk '/^\[/ {taken = /tool\.mypy/} taken' pyproject.toml >"$config"
    cat >>"$config" <<'TOML'
[[tool.mypy.overrides]]
module = ["zsseg_rt.export.*", "zsseg_rt.models.*", "zsseg_rt.torch_files.*", "zsseg_rt.training.*", "zsseg_rt.backends._torch.*", "zsseg_rt.backends._torch_program.*"]
ignore_errors = true
TOML
  fi
  mypy --config-file "$config" --cache-dir "${ZSSEG_TEST_CACHE:-$PWD/build}/mypy"
}

lint() { # [fast]
  ruff check .
  ruff format --check .
  echo "imports:"
  lint-imports --no-cache --no-logo
  echo "types (a minute where nothing is cached):"
  types
  [ "${1:-}" != fast ] || return 0
  check-jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
  if command -v zizmor >/dev/null; then # pip has none for aarch64
    zizmor -q --offline .github/workflows
  fi
  hadolint containers/*.Dockerfile
  git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'cpp_tests/*.cpp' 'cpp_tests/*.h' |
    xargs clang-format --dry-run -Werror
}

# Two tests at a time, on machines of any size: each process may hold a few GB, and torch's threads
# would only take the other process's core. A process keeps to the files that it began with, for
# their fixtures, until the other has nothing left.
export OMP_NUM_THREADS=1
at_once=(-n 2 --dist worksteal)

if [ "$mode" = fast ]; then
  say "lint and types"
  lint fast
  say "Python tests that need no torch and no other process"
  [ -n "$named" ] || set -- python_tests/unit "$@"
  exec python -m pytest -q "${at_once[@]}" --fast "$@"
fi

say "C++ tests: build"
cmake -S . -B "$build" -DZSSEG_BUILD_TESTS=ON >/dev/null
cmake --build "$build"
ZSSEG_EMULATED_EXTENSION=$(ls "$PWD/$build"/cpp_tests/cuda_emulation/_C*)
export ZSSEG_EMULATED_EXTENSION

nightly=()
[ "$mode" != nightly ] || nightly=(--nightly)
if [ $# = 0 ]; then
  # CUDA tests on an emulated GPU take what the others leave of the machine: those often wait,
  # and linters take one core.
  # Only these files are imported; test_gpu_* are for real ones.
  mapfile -t cuda < <(
    grep -rlE --include='test_*.py' 'needs_cuda|def test_.*\bdevice\b' python_tests |
      grep -v /test_gpu_ | sort
  )
  ZSSEG_EXTENSION=$ZSSEG_EMULATED_EXTENSION ZSSEG_REQUIRE_CUDA=1 nice -n 5 \
    python -m pytest -q -n 0 -p no:cacheprovider "${nightly[@]}" -m needs_cuda "${cuda[@]}" \
    >"$build/emulated_gpu.log" 2>&1 &
  emulated=$!
  trap 'kill "$emulated" 2>/dev/null || true' EXIT
fi

say "lint and types"
lint

say "C++ tests"
ctest --test-dir "$build" --output-on-failure --parallel 2

if [ "$mode" = nightly ] && [ "$(uname -m)" = x86_64 ]; then
  say "C++ tests on an emulated aarch64 CPU"
  code=0
  bash tools/machines/aarch64.sh "$build/aarch64" || code=$?
  case $code in
    0) ;;
    4) echo "skipped: parts are missing" ;;
    *) exit "$code" ;;
  esac
fi

say "Python tests"
python -m pytest "${at_once[@]}" "${nightly[@]}" "$@"

if [ $# = 0 ]; then
  say "Python tests that ask what the CPU can do, on one with AVX2 alone"
  mapfile -t asking < <(grep -rlE --include='test_*.py' 'support.cpus|"vnni"' python_tests | sort)
  ZSSEG_TEST_CPU=avx2 ZSSEG_CPU_ISA=v3 ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell \
    python -m pytest -q "${at_once[@]}" -p no:cacheprovider "${asking[@]}" \
    python_tests/system/test_demo.py

  say "CUDA tests on an emulated GPU"
  code=0
  wait "$emulated" || code=$?
  cat "$build/emulated_gpu.log"
  exit "$code"
fi
