"""What quantising is asked for, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

from zsseg_rt.bundles.quantization import QuantizationSpec
from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.quantized.number_formats import FORMATS


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """How a bundle is quantised.

    Attributes:
        precision: ``"int8"`` or ``"fp8"``.
        min_agreement: Share of clear cells that must keep float32's label.
        max_miou_loss: Points of mIoU that may be lost where masks are given, and by which unseen
            classes may lose more than seen ones.
        seed: Chooses pictures and samples.
        overwrite: Whether to replace an existing bundle.
    """

    precision: str = "int8"
    min_agreement: float = 0.98
    max_miou_loss: float = 0.5
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, FORMATS)
        if not 0.0 < self.min_agreement <= 1.0:
            raise ArgumentError(
                f"min_agreement: expected above 0 and at most 1, got {self.min_agreement}"
            )
        if not 0.0 <= self.max_miou_loss <= 100.0:
            raise ArgumentError(
                f"max_miou_loss: expected points from 0 to 100, got {self.max_miou_loss}"
            )
        if not 0 <= self.seed < 2**63:
            raise ArgumentError(f"seed: expected from 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One group of layers that read the same tensor.

    Attributes:
        graph: The graph.
        name: The first layer of the group.
        count: Layers of the group.
        precision: What it is written in.
        method: How its range was found; a layer that read zeros alone has none, and stays as it is.
        error: Squared error of its results relative to their squares, on the samples.
    """

    graph: str
    name: str
    count: int
    precision: str
    method: str
    error: float


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What was measured, and whether a bundle was written.

    Attributes:
        precision: ``"int8"`` or ``"fp8"``.
        spec: What ``bundle.json`` says of it.
        everything: Agreement with every layer quantised.
        layers: One row per group.
        path: The bundle, or None if the gate did not hold.
    """

    precision: str
    spec: QuantizationSpec
    everything: float
    layers: tuple[LayerReport, ...]
    path: str | None = None
