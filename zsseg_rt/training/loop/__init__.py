"""The training loop and what it keeps: checkpoints, logs, state."""

from __future__ import annotations

from pathlib import Path

from zsseg_rt.common.files import is_file, is_folder

CHECKPOINT_MARK = "zsseg_rt.training.checkpoint"
"""Name of the format, in the first bytes of a checkpoint file."""


def is_run(path: str | Path) -> bool:
    """Whether a path is a folder, as runs are, or one of their checkpoint files."""
    if is_folder(Path(path)):
        return True
    file = checkpoint_file(path)
    if not is_file(file):
        return False
    with file.open("rb") as stream:
        return CHECKPOINT_MARK.encode() in stream.read(512)


def checkpoint_file(path: str | Path) -> Path:
    """The file that a path names, with or without its ``.pt``."""
    path = Path(path)
    named = path.with_name(f"{path.name}.pt") if path.name else path
    return named if is_file(named) and not path.exists() else path
