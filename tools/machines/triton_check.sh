#!/usr/bin/env bash
# Installs Triton Inference Server out of the nvidia-pytriton wheel and runs the tests that need it.
#
#   bash tools/machines/triton_check.sh [COMMAND...]    by default the tests
#
# Needs the package's compiled core in the checkout (pip install -e .) for the same Python, and
# that Python as a shared library.
#
# ZSSEG_TRITON_VENV=DIR  virtual environment to make or reuse (default: build/triton)
# ZSSEG_PYTHON=EXE       interpreter for a new environment (default: python3)
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
[[ "${1:-}" != -* ]] || { echo "triton_check: expected a command, got $1" >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=${ZSSEG_TRITON_VENV:-$PWD/build/triton}
if [ ! -x "$venv/bin/python" ]; then
  "${ZSSEG_PYTHON:-python3}" -m venv "$venv"
fi
# An environment of its own: this server needs NumPy < 2.
"$venv/bin/python" -m pip install -q --disable-pip-version-check "nvidia-pytriton==0.7.0" "numpy<2" \
  pytest pillow openvino opencv-python-headless tokenizers ftfy safetensors typer rich platformdirs filelock
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The server's Python reads this environment, but not PYTHONPATH.
echo "$PWD" >"$site/zsseg_rt_checkout.pth"
version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
libpython=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
if ! ls "$libpython/libpython$version"*.so* >/dev/null 2>&1; then
  echo "$libpython: expected libpython$version as a shared library, got none." \
    "Use a Python built with --enable-shared: ZSSEG_PYTHON=EXE" >&2
  exit 4
fi
if ! (cd / && "$venv/bin/python" -c 'import zsseg_rt.ops'); then
  echo "Build the core for Python $version first: pip install -e ." >&2
  exit 4
fi
# The program that runs models has to lie beside the backend.
server=$site/pytriton/tritonserver
backends=$venv/triton_backends
mkdir -p "$backends/python"
cp "$server"/backends/python/*.so "$server"/backends/python/*.py "$backends/python/"
cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$backends/python/"

export PATH="$venv/bin:$PATH" ZSSEG_TRITON_SERVER="$server/bin/tritonserver"
export ZSSEG_TRITON_BACKENDS="$backends"
export ZSSEG_TRITON_LIBRARIES="$site/nvidia_pytriton.libs:$libpython"
unset PYTHONPATH VIRTUAL_ENV PYTHONHOME
if [ $# = 0 ]; then
  set -- python -m pytest -q -p no:cacheprovider python_tests/system/test_triton_server.py
fi
"$@"
