#!/usr/bin/env bash
# Builds the documentation as a site, which needs nothing from elsewhere when it is read.
#
#   bash tools/docs.sh [folder, default build/docs]      then open index.html in it
#
# A link that leads nowhere, a missing anchor, a page that the navigation (docs/zensical.toml) lacks,
# and anything that a browser would fetch from elsewhere end the build. Needs pip install -e '.[docs]'.
# Exit codes: 0 built and whole, 1 something is wrong, 4 the generator is not installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${ZSSEG_PYTHON:-python}" -m tools.docs "$@"
