#!/usr/bin/env bash
# Compiles the core for aarch64 (Jetson, ARM servers) and runs the C++ tests in an emulated CPU.
#
#   bash tools/aarch64.sh [build folder, default build/aarch64]
#
# Needs g++-aarch64-linux-gnu, qemu-user and googletest; as root on Debian or Ubuntu it installs
# what is missing. On an aarch64 machine use tools/test.sh. Exit code 4: a part is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-build/aarch64}
sysroot=/usr/aarch64-linux-gnu

missing=()
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
[ -d /usr/src/googletest ] || missing+=(googletest)
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -q &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" &&
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
prefix=$PWD/$folder/prefix
if [ ! -e "$prefix/include/gtest/gtest.h" ]; then
  cmake -S /usr/src/googletest -B "$folder/googletest" "${cross[@]}" -DBUILD_GMOCK=OFF \
    -DCMAKE_INSTALL_PREFIX="$prefix" >/dev/null
  cmake --build "$folder/googletest" --target install >/dev/null
fi
cmake -S . -B "$folder/zsseg" "${cross[@]}" -DCMAKE_PREFIX_PATH="$prefix" -DZSSEG_BUILD_TESTS=ON \
  -DZSSEG_BUILD_PYTHON=OFF -DZSSEG_BUILD_EMULATED_GPU=OFF -DZSSEG_CUDA=OFF \
  -DCMAKE_GTEST_DISCOVER_TESTS_DISCOVERY_MODE=PRE_TEST >/dev/null
cmake --build "$folder/zsseg"
# The emulator itself fails in threads that are made after a fork.
qemu-aarch64 -L "$sysroot" "$folder/zsseg/zsseg_cpp_tests" --gtest_brief=1 \
  --gtest_filter='-*Forked*'
