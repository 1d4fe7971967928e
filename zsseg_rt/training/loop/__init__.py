"""The training loop and what it keeps: checkpoints, logs, state."""

from __future__ import annotations

from pathlib import Path

from zsseg_rt.common.files import is_file, is_folder

CHECKPOINT_MARK = "zsseg_rt.training.checkpoint"
"""Name of the format, in the first bytes of a checkpoint file."""


def is_run(path: str | Path) -> bool:
    """Whether a path is a folder, as runs are, or one of their checkpoint files."""
    path = Path(path)
    if is_folder(path) or not is_file(path):
        return is_folder(path)
    with path.open("rb") as stream:
        return CHECKPOINT_MARK.encode() in stream.read(512)
