#!/usr/bin/env bash
# Runs the C++ tests under the compiler's sanitizers: one build that watches memory and undefined
# behaviour, one that watches for data races. Minutes, so not a part of tools/test.sh.
#
#   bash tools/sanitize.sh [build folder, default build/sanitize]
#   bash tools/sanitize.sh --extension [build folder]
#
# With --extension it builds the Python extension for the target ops-sanitized of tools/torture.sh
# instead, and ends with a line that says how to use it. It takes the Python of ZSSEG_PYTHON.
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
with_extension=
if [ "${1:-}" = --extension ]; then
  with_extension=1
  shift
fi
if [[ "${1:-}" == -* || $# -gt 1 ]]; then
  echo "sanitize: expected [--extension] [build folder], got $*" >&2
  exit 2
fi
folder=$(realpath -m "${1:-build/sanitize}")

if [ -n "$with_extension" ]; then
  python=${ZSSEG_PYTHON:-python}
  cmake -S . -B "$folder/extension" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -O1" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DZSSEG_CUDA=OFF >/dev/null
  cmake --build "$folder/extension" --target _C
  echo "export ZSSEG_SANITIZED_EXTENSION=$(ls "$folder"/extension/_C*.so)"
  exit
fi

for sanitizer in address,undefined thread; do
  printf '\n== %s\n' "$sanitizer"
  build=$folder/${sanitizer%%,*}
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_CXX_FLAGS="-fsanitize=$sanitizer -fno-sanitize-recover=all -O1" \
    -DZSSEG_BUILD_TESTS=ON -DZSSEG_BUILD_PYTHON=OFF -DZSSEG_BUILD_EMULATED_GPU=OFF \
    -DZSSEG_CUDA=OFF >/dev/null
  cmake --build "$build"
  # The race detector does not follow threads that are made after a fork.
  TSAN_OPTIONS=halt_on_error=1 "$build/zsseg_cpp_tests" \
    --gtest_filter="$([ "$sanitizer" = thread ] && echo '-*Forked*' || echo '*')"
done
