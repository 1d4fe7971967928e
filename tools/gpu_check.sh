#!/usr/bin/env bash
# Checks everything that needs a GPU, times it, and writes one record. Needs no network.
#
#   bash tools/gpu_check.sh [--minutes 30] [--out FOLDER] [--bundle FOLDER] [--no-build]
#                           [--only GROUP]... [--continue] [--quick]
#
# It takes at most half an hour, or as many minutes as it is given: what tells most comes first, and
# the record is kept after every step. Needed are an NVIDIA GPU with its driver, Python with NumPy,
# and nvcc, or with --no-build an extension that was built before. What else is missing (torch,
# TensorRT, pytest, OpenCV, the models of prepare.sh, NVIDIA's profilers) is named in the record, and
# what needs it does not count as passed. docs/deploy.md says more.
#
# ZSSEG_PYTHON=EXE  interpreter (default: python3)
# Exit status: 0 all passed, 1 something failed, 3 nothing failed but something could not run,
# 4 no GPU, no nvcc, or NumPy is missing: nothing was checked.
set -euo pipefail
exec "${ZSSEG_PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check" "$@"
