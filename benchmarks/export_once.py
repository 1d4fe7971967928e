"""Export a weights file once, and print what it took; ``small_encoders.py`` runs it.

    python benchmarks/export_once.py WEIGHTS HEAD SIDE ACTIVATION

It imports nothing but the package: torch alone would take more memory than many exports.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from zsseg_rt.export.clip_file import DenseHead, export_clip_file


def peak_mb() -> float:
    """The most memory that this process had; getrusage would count what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def main() -> None:
    """Write ``out.zsseg`` beside the weights, with every check."""
    file, head, side, activation = sys.argv[1:]
    settings = DenseHead(head=head, size_hw=(int(side), int(side)), activation=activation)
    start = time.perf_counter()
    export_clip_file(file, Path(file).with_name("out.zsseg"), settings, overwrite=True)
    seconds = time.perf_counter() - start
    taken = {"seconds": seconds, "cpu_seconds": time.process_time(), "peak_mb": peak_mb()}
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
