#!/usr/bin/env bash
# Runs the C++ tests under the compiler's sanitizers: one build that watches memory and undefined
# behaviour, one that watches for data races. Minutes, so not a part of tools/test.sh.
#
#   bash tools/sanitize.sh [build folder, default build/sanitize]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-build/sanitize}

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
