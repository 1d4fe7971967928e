"""Time a bundle: the same as ``zsseg-rt profile``.

python tools/profile.py BUNDLE [--source ...] [--json FILE]
"""

import sys
from pathlib import Path

# Beside this file, it would itself be taken for Python's own module ``profile``.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

from zsseg_rt.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
