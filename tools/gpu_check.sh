#!/usr/bin/env bash
# Checks everything that needs a GPU, times it, and writes one record. Needs no network.
#
#   bash tools/gpu_check.sh [--no-build] [--out FOLDER] [--quick]
#
# It takes less than eight minutes. Needed are an NVIDIA GPU with its driver, Python with torch,
# NumPy and pytest, and nvcc, or with --no-build an extension that was built before. What else is
# missing (compute-sanitizer, onnx, a CUDA build of torch) is named in the record, and what needs it
# does not count as passed.
#
# ZSSEG_PYTHON=EXE  interpreter (default: python3)
# Exit status: 0 all passed, 1 something failed, 3 nothing failed but something could not run,
# 4 no GPU, no nvcc, or a package is missing: nothing was checked.
set -euo pipefail
exec "${ZSSEG_PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check" "$@"
