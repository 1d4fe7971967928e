"""``python -m zsseg_rt`` is ``zsseg-rt``, even where the script is not on the path."""

from __future__ import annotations

import signal
import sys


def run() -> int:
    """Run the command line; Ctrl-C ends it with one line, even while it is being imported."""
    try:
        from zsseg_rt.cli import main

        code = main()
    except KeyboardInterrupt:
        sys.stderr.write("zsseg-rt: interrupted\n")
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is to exit
    return code


if __name__ == "__main__":
    sys.exit(run())
