#!/usr/bin/env bash
# Tries hostile input of every kind, and kills commands at random moments.
#
#   bash tools/torture.sh [--seconds N] [--cases N] [--seed S] [TARGET...]    --list names the targets
#   bash tools/torture.sh --seed S --case K TARGET                            one case again
#
# Any input may succeed or be refused with one of zsseg_rt's errors; crashes, hangs, other errors and
# cases that take over 1 GB are failures. Exit codes: 0 none, 1 some (each is printed), 2 usage.
# Needs the package with the extra `dev`; docs/reliability.md tells more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${ZSSEG_PYTHON:-python}" -m tools.torture "$@"
