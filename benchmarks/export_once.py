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
from zsseg_rt.profiling.worker import Stopwatch, read_memory_mb


def main() -> None:
    """Write ``out.zsseg`` beside the weights, with every check."""
    file, head, side, activation = sys.argv[1:]
    settings = DenseHead(head=head, size_hw=(int(side), int(side)), activation=activation)
    watch = Stopwatch()
    export_clip_file(file, Path(file).with_name("out.zsseg"), settings, overwrite=True)
    seconds, memory = watch.seconds, read_memory_mb() or (0.0, 0.0)
    print(
        json.dumps({"seconds": seconds, "cpu_seconds": time.process_time(), "peak_mb": memory[1]})
    )


if __name__ == "__main__":
    main()
