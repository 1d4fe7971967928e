"""The inputs of dense heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsseg_rt.networks.clip import ImageTower
from zsseg_rt.onnx.operations import Operations, Value


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A network up to its last block, as a head reads it."""

    tower: ImageTower  # Weights and sizes
    grid_hw: tuple[int, int]  # The grid of patches
    # Tokens [B, 1 + N, W] before the first block and after each but the last
    outputs: Sequence[Value]
    # The head's settings, such as prior_std
    options: Mapping[str, Any] = field(default_factory=dict)

    def after(self, block: int) -> Value:
        """Tokens after a block, counted from 0; -1 is the input of the first."""
        return self.outputs[block + 1]


Head = Callable[[Operations, Trunk], Value]
"""Makes the last block's patches [B, N, W], before ``ln_post``."""


def patches_of(ops: Operations, tokens: Value) -> Value:
    """Tokens without the class token."""
    return ops.slice(tokens, 1, 1, tokens.shape[1])
