"""The part of ``bundle.json`` on graphs in INT8 and FP8: how they were made, what they lose."""

from __future__ import annotations

from dataclasses import dataclass, field

NARROW = ("int8", "fp8")
"""Precisions of 8 bits."""


@dataclass(frozen=True, kw_only=True)
class MaskLoss:
    """mIoU on pictures with masks, of the classes that the masks hold."""

    dataset: str  # Where pictures and masks are from
    # In percent: "mIoU", and of seen and unseen classes "mIoU(S)" and "mIoU(U)"; without those of
    # which the masks hold no class
    float32: dict[str, float]
    narrow: dict[str, float]  # The same of the graphs in 8 bits
    most: float  # Points that may be lost, and by which unseen classes may lose more than seen ones

    def __post_init__(self) -> None:
        if "mIoU" not in self.float32 or self.float32.keys() != self.narrow.keys():
            raise ValueError(f"narrow: expected mIoU and what float32 has, got {list(self.narrow)}")

    @property
    def lost(self) -> dict[str, float]:
        """Points lost, by the same names."""
        return {name: before - self.narrow[name] for name, before in self.float32.items()}

    @property
    def passed(self) -> bool:
        """Whether no more is lost than may be; NaN never is."""
        lost = self.lost
        more = lost.get("mIoU(U)", 0.0) - lost.get("mIoU(S)", 0.0)
        split = "mIoU(U)" in lost and "mIoU(S)" in lost
        return lost["mIoU"] <= self.most and (not split or more <= self.most)

    def describe(self) -> str:
        """One line for people."""
        figures = ", ".join(
            f"{name} {before:.2f} -> {self.narrow[name]:.2f}"
            for name, before in self.float32.items()
        )
        return f"on masks of {self.dataset}: {figures} (gate: {self.most:g} points lost)"


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """How a bundle's graphs in INT8 or FP8 were made, and what they lose on pictures."""

    agreement: float  # Share of cells with float32's label, among those where it is clear
    agreement_of_all: float  # The same among all cells
    min_agreement: float  # What was asked for
    # SHA-256 of the pictures, of a data set's their pixels': those that ranges are from, then those
    # measured on
    photos: tuple[str, ...]
    measured_photos: int  # How many of these, the last ones, were measured on
    classes: tuple[str, ...]  # The classes of the measurement
    # By graph, each layer that could be quantised and its precision
    layers: dict[str, dict[str, str]]
    seed: int = 0  # What chose images and samples
    masks: MaskLoss | None = None  # What is lost where masks say what is right; None without masks
    # By stage, how far the golden sample was off when the bundle was made
    golden: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 < self.min_agreement <= 1.0:
            raise ValueError(f"min_agreement: expected above 0, up to 1, got {self.min_agreement}")

    @property
    def passed(self) -> bool:
        """Whether agreement and mIoU are what was asked for; NaN never is."""
        return self.agreement >= self.min_agreement and (self.masks is None or self.masks.passed)
