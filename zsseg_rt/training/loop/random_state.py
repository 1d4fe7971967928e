"""Random numbers that can be saved, restored and repeated."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, process_index: int = 0) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    own = (seed + process_index) % 2**32
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def capture_random_state() -> dict[str, Any]:
    """Capture the state of every global generator of this process, as tensors and plain values.

    Returns:
        By generator: ``python``, ``numpy``, ``torch`` and, with a GPU, ``cuda``.
    """
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from what :func:`capture_random_state` returned.

    A state without a GPU generator leaves the GPU's generator alone.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave all generators as they were, whatever the block draws."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)


@contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """Use algorithms that give the same bits every time, and undo that afterwards.

    An operation without such an algorithm raises an error that names it. It costs speed: if not
    enabled, cuDNN picks the fastest convolution for each shape instead.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )
    if enabled:  # read by cuBLAS when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = not enabled
    torch.backends.cudnn.deterministic = enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[1:]
