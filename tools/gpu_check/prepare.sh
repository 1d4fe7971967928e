#!/usr/bin/env bash
# Exports what tools/gpu_check.sh measures, on any computer, so that nothing is exported on the GPU's.
#
#   bash tools/gpu_check/prepare.sh [FOLDER]     (default: build/gpu_check/models)
#
# It needs torch and the exporter (pip install '.[torch]'), no GPU, and a minute or two. Carry
# FOLDER/models.tar.xz (26 MB) to the GPU's computer and name its folder: gpu_check.sh --bundle FOLDER
#
# ZSSEG_PYTHON=EXE  interpreter (default: python3)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${ZSSEG_PYTHON:-python3}" "$root/tools/gpu_check/gpu_models.py" "$@"
