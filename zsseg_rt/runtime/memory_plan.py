"""The memory that an engine will take, before anything is loaded; and a limit that it keeps to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from zsseg_rt.backends.registry import Placement, chosen_graph
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.config import PRECISIONS, EngineConfig
from zsseg_rt.errors import BackendError, ConfigError
from zsseg_rt.onnx.check import graph_memory
from zsseg_rt.runtime.families.base import Family

MB = 1_000_000
_SIDE_STEP, _SMALLEST_SIDE = 32, 64


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that an engine's networks take, without what libraries and plan builders take."""

    weights: int  # Of the graphs, in the precision that they are computed in
    activations: int  # Of one lane: the largest sum of tensors that a graph holds at a time
    # The text encoder's weights and tensors while names are embedded, if the bundle has one
    text: int
    num_lanes: int  # Lanes
    precision: str  # The image encoder's

    @property
    def total(self) -> int:
        """All lanes together."""
        return self.weights + self.text + self.num_lanes * self.activations


def plan_memory(
    bundle: Bundle, family: Family, placement: Placement, config: EngineConfig
) -> MemoryPlan:
    """Sum up what a bundle's graphs take."""
    allowed = bundle.auto_precisions(family.auto_precisions)
    # TensorRT sets memory aside for the most classes that a bundle takes; other backends allocate
    # for those in force, of which the usual number is counted.
    place = 2 if placement.backend == "tensorrt" else 1
    axes = {name: bounds[place] for name, bounds in family.axes.items()}
    weights, activations, precision = 0, 0, ""
    for name in family.graphs:
        choice, path = chosen_graph(
            bundle, name, placement=placement, precision=config.precision, allowed=allowed
        )
        memory = graph_memory(path, float_bytes=float_bytes(choice.precision, placement), axes=axes)
        weights, activations = weights + memory.weights, activations + memory.activations
        precision = choice.precision if name == "image_encoder" else precision
    text = 0
    if "text_encoder" in bundle.graphs:
        path = bundle.open_path(bundle.graph("text_encoder", "float32"))
        words = graph_memory(path, float_bytes=4, axes={})
        text = words.weights + words.activations
    return MemoryPlan(
        weights=weights, activations=activations, text=text, num_lanes=config.num_lanes,
        precision=precision,
    )  # fmt: skip


def float_bytes(precision: str, placement: Placement) -> int:
    """Bytes of the numbers that are not in 8 bits; OpenVINO's INT8 leaves float32 around."""
    wide = precision == "float32" or (precision == "int8" and placement.device == "cpu")
    return 4 if wide else 2


def require_memory(
    bundle: Bundle, family: Family, placement: Placement, config: EngineConfig
) -> None:
    """Refuse an engine that will not fit into ``max_memory``, and say what would."""
    if config.max_memory is None:
        return
    plan, most = plan_memory(bundle, family, placement, config), config.max_memory * MB
    if plan.total <= most:
        return
    fitting = list(_what_fits(bundle, family, placement, config, plan))
    text = f" + text encoder {_mb(plan.text)}" if plan.text else ""
    raise ConfigError(
        f"max_memory: expected at least {_mb(plan.total)} MB (weights {_mb(plan.weights)}{text} + "
        f"num_lanes {plan.num_lanes} x {_mb(plan.activations)}, in {plan.precision}), got "
        f"{config.max_memory}. "
        + (f"What fits: {'; '.join(fitting)}." if fitting else "Use a smaller bundle.")
    )


def _what_fits(
    bundle: Bundle, family: Family, placement: Placement, config: EngineConfig, plan: MemoryPlan
) -> Iterator[str]:
    """Changes each of which suffices alone."""
    assert config.max_memory is not None
    most = config.max_memory * MB
    for precision in (one for one in PRECISIONS if one not in ("auto", plan.precision)):
        try:
            other = plan_memory(bundle, family, placement, replace(config, precision=precision))
        except BackendError:
            continue  # cannot be had here
        if other.total <= most:
            yield f"precision={precision!r} ({_mb(other.total)} MB)"
    for lanes in range(plan.num_lanes - 1, 0, -1):
        if (total := replace(plan, num_lanes=lanes).total) <= most:
            yield f"num_lanes={lanes} ({_mb(total)} MB)"
            break
    yield from _smaller_inputs(bundle, plan, most)


def _smaller_inputs(bundle: Bundle, plan: MemoryPlan, most: int) -> Iterator[str]:
    """The largest input that fits; activations fall at least as its area does."""
    height, width = bundle.preprocess.size_hw
    largest = (min(height, width) - 1) // _SIDE_STEP * _SIDE_STEP
    for side in range(largest, _SMALLEST_SIDE - 1, -_SIDE_STEP):
        share = side / min(height, width)
        fewer = replace(plan, activations=round(plan.activations * share**2))
        if fewer.total <= most:
            smaller = f"{round(height * share)}x{round(width * share)}"
            yield f"a bundle exported for {smaller} instead of {height}x{width}"
            return


def _mb(size: int) -> int:
    return -(-size // MB)
