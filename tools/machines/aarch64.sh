#!/usr/bin/env bash
# Compiles the core for aarch64 (Jetson, ARM servers) and runs the C++ tests in an emulated CPU.
#
#   bash tools/machines/aarch64.sh [build folder, default build/aarch64]
#   bash tools/machines/aarch64.sh --python [build folder]
#
# With --python it compiles the extension module instead, and runs it there in Debian's or Ubuntu's
# own Python with the wheels that an installation on aarch64 takes: the tests of operations and of
# class names, and the self-check of every stored bundle with OpenVINO. It takes minutes.
#
# Needs g++-aarch64-linux-gnu, qemu-user and googletest; as root on Debian or Ubuntu it installs
# what is missing. On an aarch64 machine use tools/test.sh. Exit code 4: a part is missing.
# ZSSEG_PYTHON=EXE  with --python: one with the package, pip and pybind11 (default: python)
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
with_python=
if [ "${1:-}" = --python ]; then
  with_python=1
  shift
fi
if [[ "${1:-}" == -* || $# -gt 1 ]]; then
  echo "Usage: bash tools/machines/aarch64.sh [--python] [build folder]" >&2
  exit 2
fi
folder=$(realpath -m "${1:-build/aarch64}")
sysroot=/usr/aarch64-linux-gnu

missing=()
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
[ -n "$with_python" ] || [ -d /usr/src/googletest ] || missing+=(googletest)
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing, with what they depend on: ${missing[*]}"
  apt-get update -q &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends --no-upgrade \
      "${missing[@]}" &&
    missing=()
fi
if [ ${#missing[@]} -gt 0 ]; then
  echo "Missing: ${missing[*]}. Run: sudo apt-get install ${missing[*]}" >&2
  exit 4
fi

cross=(
  -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc
)

cpp_tests() {
  local prefix=$folder/prefix
  if [ ! -e "$prefix/include/gtest/gtest.h" ]; then
    cmake -S /usr/src/googletest -B "$folder/googletest" "${cross[@]}" -DBUILD_GMOCK=OFF \
      -DCMAKE_INSTALL_PREFIX="$prefix" >/dev/null
    cmake --build "$folder/googletest" --target install >/dev/null
  fi
  cmake -S . -B "$folder/zsseg" "${cross[@]}" -DCMAKE_PREFIX_PATH="$prefix" \
    -DZSSEG_BUILD_TESTS=ON -DZSSEG_BUILD_PYTHON=OFF -DZSSEG_BUILD_EMULATED_GPU=OFF \
    -DZSSEG_CUDA=OFF -DCMAKE_GTEST_DISCOVER_TESTS_DISCOVERY_MODE=PRE_TEST >/dev/null
  cmake --build "$folder/zsseg"
  # The emulator itself fails in threads that are made after a fork.
  qemu-aarch64 -L "$sysroot" "$folder/zsseg/zsseg_cpp_tests" --gtest_brief=1 \
    --gtest_filter='-*Forked*'
}

extension() { # the package with an extension for the emulated Python, in $folder/package
  local host=${ZSSEG_PYTHON:-python} requirements
  mapfile -t requirements < <("$host" -c 'from importlib.metadata import requires
print(*(line for line in requires("zsseg_rt") if "extra ==" not in line), sep="\n")')
  ZSSEG_PYTHON=$host bash tools/machines/aarch64_python.sh "$folder/python" \
    "${requirements[@]}" pytest hypothesis pillow
  # CMake asks the emulated Python itself what it is built like.
  cmake -S . -B "$folder/extension" "${cross[@]}" -DZSSEG_CUDA=OFF \
    -DCMAKE_CXX_FLAGS="-isystem $folder/python/root/usr/include" \
    -DPython_EXECUTABLE="$folder/python/python" \
    -Dpybind11_DIR="$("$host" -m pybind11 --cmakedir)" >/dev/null
  cmake --build "$folder/extension" --target _C
  rm -rf "$folder/package"
  mkdir -p "$folder/package"
  tar -c --exclude='_C*.so' --exclude=__pycache__ zsseg_rt | tar -x -C "$folder/package"
  cp "$folder"/extension/_C*.so "$folder/package/zsseg_rt"
}

python_tests() {
  local tests=$PWD/python_tests bundle files
  cd "$folder/package" # where zsseg_rt is found first
  export ZSSEG_HOME=$folder/home PYTHONDONTWRITEBYTECODE=1
  for bundle in zsseg_rt/demo/scenes.zsseg "$tests"/bundles/v1/*.zsseg; do
    "$folder/python/python" -m zsseg_rt info "$bundle" --check
  done
  mapfile -t files < <(find "$tests" -name 'test_ops_*.py' -o -name test_vocabulary.py \
    -o -name test_tokenizer.py)
  "$folder/python/python" -m pytest -q -p no:cacheprovider "${files[@]}"
}

if [ -n "$with_python" ]; then
  extension
  python_tests
else
  cpp_tests
fi
