"""Settings of SFP and SC-CLIP, dense heads that repair outliers and let alike patches share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError, ShapeError

OutlierRule = Literal["l2", "som", "lof"]

NUM_OUTLIERS = 10
NEIGHBOURS = 31  # of the local outlier factor, the patch itself included
RULES_OF_OUTLIERS: dict[str, OutlierRule] = {"sfp": "l2", "sc_clip": "lof"}
"""The heads, and how they find outliers unless told."""
SHIPPED_LAYERS = {"pre": 3, "post": 1, "first": 1, "end": 4}
"""For the CLIP that ships, which has six blocks."""


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """Settings of SFP and SC-CLIP; the defaults are official and made for 12 blocks or more.

    Attributes:
        pm: How outliers are found: ``"l2"``, the ten longest patches; ``"som"``, at most ten that
            the class token attends to; ``"lof"``, a twentieth of all, by local density. None is
            the head's: ``"l2"`` for SFP, ``"lof"`` for SC-CLIP.
        r: Share of the class token that every patch gets; it also gates ``"som"``.
        beta: Cosine below which two patches share nothing.
        pre: Block whose patches tell which are alike, from 0.
        post: The same for the second sharing.
        first: First block of the sum Z.
        end: One beyond its last block.
    """

    pm: OutlierRule | None = None
    r: float = 0.3
    beta: float = 0.4
    pre: int = 8
    post: int = 3
    first: int = 3
    end: int = 10

    def __post_init__(self) -> None:
        if self.pm is not None:
            check_choice("pm", self.pm, get_args(OutlierRule))
        if not (math.isfinite(self.r) and self.r >= 0):
            raise ArgumentError(f"r: expected a number of at least 0, got {self.r}. Change it.")
        if not 0 < self.beta <= 1:
            raise ArgumentError(f"beta: expected a cosine in (0, 1], got {self.beta}. Change it.")

    def check_depth(self, num_layers: int) -> None:
        """Refuse layers that a trunk does not have."""
        last = num_layers - 2
        for name, most in (("pre", last), ("post", last), ("first", last), ("end", last + 1)):
            value = getattr(self, name)
            if not (name == "end") <= value <= most or num_layers < 3:
                raise ArgumentError(
                    f"{name}: expected a block from {int(name == 'end')} to {most} of a trunk of "
                    f"{num_layers} blocks, whose last is the head's, got {value}. Official heads "
                    "need 11 blocks; for fewer set pre, post, first and end."
                )
        if self.first >= self.end:
            raise ArgumentError(
                f"first: expected less than end = {self.end}, got {self.first}. Sum a block."
            )


def check_grid(pm: OutlierRule, grid_hw: tuple[int, int]) -> None:
    """Refuse grids with fewer patches than a rule compares."""
    least = NEIGHBOURS if pm == "lof" else NUM_OUTLIERS
    if math.prod(grid_hw) < least:
        raise ShapeError(
            f"image: expected at least {least} patches for pm = '{pm}', got a grid of "
            f"{grid_hw[0]}x{grid_hw[1]}. Use a larger image."
        )


def num_local_outliers(num_patches: int) -> int:
    """Patches above the 95 % quantile of as many scores."""
    return num_patches - 1 - 95 * (num_patches - 1) // 100
