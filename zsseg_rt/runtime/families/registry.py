"""Find the class of a bundle's family; ``bundles.specs.FAMILIES`` has all else."""

from __future__ import annotations

from collections.abc import Callable

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import FAMILIES, family_settings
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError
from zsseg_rt.runtime.families.aggregation import AggregationFamily
from zsseg_rt.runtime.families.base import Family
from zsseg_rt.runtime.families.dense import DenseFamily
from zsseg_rt.runtime.families.descriptor import DescriptorFamily
from zsseg_rt.runtime.families.proposals import ProposalsFamily
from zsseg_rt.runtime.families.segment_tokens import SegmentTokensFamily
from zsseg_rt.runtime.frames import Windows

_FACTORIES: dict[str, Callable[[Bundle, EngineConfig], Family]] = {
    "aggregation": AggregationFamily,
    "dense": DenseFamily,
    "descriptor": DescriptorFamily,
    "proposals": ProposalsFamily,
    "segment_tokens": SegmentTokensFamily,
}


def create_family(bundle: Bundle, config: EngineConfig) -> Family:
    """Make the family that a bundle names."""
    for name in family_settings():
        value = getattr(config, name)
        if value is not None and name not in FAMILIES[bundle.family].settings:
            raise ArgumentError(
                f"{name}: expected None for {bundle.name}, whose family {bundle.family!r} has no "
                f"such setting, got {value!r}. Leave it out."
            )
    Windows.of(bundle.preprocess, bundle.head, config)  # before graphs are loaded
    return _FACTORIES[bundle.family](bundle, config)
