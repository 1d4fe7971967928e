# shellcheck shell=bash disable=SC2154
# What tools/wheels.sh does for one wheel; it sets $work, $here and $portable.

suite_of() { # version: the Debian that has this Python
  case $1 in
    3.11) echo bookworm ;;
    3.13) echo trixie ;;
    3.14) echo sid ;;
    *) return 1 ;;
  esac
}

find_python() { # version: prints the path of an interpreter of this machine
  local found suite
  if "python$1" -c "" 2>/dev/null; then # a name on PATH may stand for nothing
    command -v "python$1"
    return
  fi
  for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/"python$1"; do
    if [ -x "$found" ]; then
      echo "$found"
      return
    fi
  done
  suite=$(suite_of "$1") && debian_python "$suite"
}

debian_python() { # suite: a Python for another Debian that runs here, by that Debian's C library
  local root found loader
  root=$here/build/pythons/$1-$(uname -m)
  found=$(bash "$here/tools/machines/debian_python.sh" "$1" "$(uname -m)" "$root" 2>/dev/null) || return
  loader=("$root"/root/usr/lib64/ld-linux-*.so.2)
  [ -e "${loader[0]}" ] || loader=("$root"/root/usr/lib/ld-linux-*.so.1)
  patchelf --set-interpreter "${loader[0]}" --force-rpath \
    --set-rpath "$root/root/usr/lib/$(uname -m)-linux-gnu" "$found"
  echo "$found"
}

build_wheel() { # Python: $work/wheel gets a wheel of $work/source
  local settings=(ZSSEG_CUDA_ARCHITECTURES="${ZSSEG_CUDA_ARCHITECTURES:-ALL}") args=
  if [ -z "${ZSSEG_CUDA:-}" ] && command -v "${CUDACXX:-nvcc}" >/dev/null; then
    settings+=(ZSSEG_CUDA=ON) # with or without a GPU here
  fi
  "$1" -m venv --without-pip "$work/build"
  local pip=(pip --python "$work/build/bin/python")
  "${pip[@]}" install -q build "setuptools>=77" "pybind11>=2.13" ninja "cmake>=3.22"
  if [ -n "$portable" ]; then
    zig_compiler "$portable"
    settings=(ZSSEG_CUDA=OFF)
    args="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$portable -DCMAKE_STRIP=/bin/true"
    args+=" -DCMAKE_CXX_COMPILER=$work/zig/c++ -DCMAKE_AR=$work/zig/ar"
    args+=" -DCMAKE_RANLIB=$work/zig/ranlib -DCMAKE_MODULE_LINKER_FLAGS=-s"
    # Its own C++ library takes a minute to compile, for each way to link: so link nothing to find out.
    args+=" -DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY"
    [ "$portable" = "$(uname -m)" ] || settings+=("${foreign[@]}")
    [ "$portable" = "$(uname -m)" ] || describe_foreign "$work/build/bin/python"
  fi
  if command -v ccache >/dev/null; then
    args+=" -DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache"
    settings+=(CCACHE_BASEDIR="$work" CCACHE_NOHASHDIR=1) # its name differs from run to run
    [ -z "$portable" ] || settings+=(CCACHE_COMPILERTYPE=clang
      CCACHE_COMPILERCHECK="string:zig $("$work/tools/bin/python" -m ziglang version) $portable")
  fi
  env PATH="$work/build/bin:$PATH" "${settings[@]}" CMAKE_ARGS="$args ${CMAKE_ARGS:-}" \
    "$work/build/bin/python" -m build -q --wheel --no-isolation -o "$work/wheel" "$work/source"
}

zig_compiler() { # machine: $work/zig gets a compiler for it
  [ ! -e "$work/zig" ] || return 0
  mkdir "$work/zig"
  local tool
  for tool in ar ranlib; do
    printf '#!/bin/sh\nexec "%s" -m ziglang %s "$@"\n' "$work/tools/bin/python" $tool >"$work/zig/$tool"
  done
  # zig spells the levels of x86-64 with underscores.
  # shellcheck disable=SC2016
  printf '#!/usr/bin/env bash\nexec "%s" -m ziglang c++ -target %s-linux-gnu.2.17 %s\n' \
    "$work/tools/bin/python" "$1" '"${@/#-march=x86-64-/-march=x86_64_}"' >"$work/zig/c++"
  chmod +x "$work"/zig/*
}

# Python's own switches for building for another machine.
foreign=(_PYTHON_HOST_PLATFORM="linux-$portable" _PYTHON_SYSCONFIGDATA_NAME=zsseg_foreign)

describe_foreign() { # Python: writes what it would say on the other machine
  "$1" - "$(uname -m)" "$portable" <<'PY'
import importlib, pathlib, sys, sysconfig

here, there = sys.argv[1:]
mine = importlib.import_module(sysconfig._get_sysconfigdata_name())
site = pathlib.Path(sysconfig.get_path("purelib"))
text = repr(mine.build_time_vars).replace(here, there)
(site / "zsseg_foreign.py").write_text(f"build_time_vars = {text}\n")
PY
}

demo() { # wheel, Python: installs it where nothing else is, and labels the demo
  local home=$work/clean began=$SECONDS
  "$2" -m venv --without-pip "$home"
  pip --python "$home/bin/python" install -q "$1"
  echo "installed in $((SECONDS - began)) s; with what it needs, $(du -sm "$home" | cut -f 1) MB"
  began=$SECONDS
  (cd "$work" && ZSSEG_HOME="$home/cache" "$home/bin/zsseg-rt" segment --demo --out "$home/out")
  ls "$home"/out/*.overlay.png >/dev/null
  echo "demo labelled in $((SECONDS - began)) s"
}

demo_emulated() { # wheel, version: the same in an emulated CPU
  local home=$work/clean suite root python platforms=() glibc began=$SECONDS
  for glibc in 17 24 26 27 28 31 34 35; do
    platforms+=(--platform "manylinux_2_${glibc}_$portable")
  done
  pip install -q --target "$home" --python-version "$2" --only-binary=:all: \
    --platform "manylinux2014_$portable" "${platforms[@]}" "$1"
  echo "installed in $((SECONDS - began)) s; with what it needs, $(du -sm "$home" | cut -f 1) MB"
  if ! command -v "qemu-$portable" >/dev/null || ! suite=$(suite_of "$2"); then
    echo "not run: needs qemu-user and a Debian with Python $2"
    return
  fi
  root=$here/build/pythons/$suite-$portable
  python=$(bash "$here/tools/machines/debian_python.sh" "$suite" "$portable" "$root")
  began=$SECONDS
  (cd "$work" && PYTHONPATH=$home ZSSEG_HOME="$home/cache" "qemu-$portable" -L "$root/root" \
    "$python" -m zsseg_rt segment --demo --out "$home/out")
  ls "$home"/out/*.overlay.png >/dev/null
  echo "demo labelled in $((SECONDS - began)) s, emulated"
}
