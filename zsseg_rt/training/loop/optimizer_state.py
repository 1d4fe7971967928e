"""An optimizer's state as tensors and plain values, so that saving it needs no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """The part of an optimizer's state that is not tensors.

    Attributes:
        groups: Its parameter groups.
        values: Values by the parameter's number and the value's name.
    """

    groups: tuple[Mapping[str, Any], ...] = ()
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def split_optimizer_state(
    state_dict: Mapping[str, Any],
) -> tuple[dict[str, Tensor], OptimizerState]:
    """Split an optimizer's ``state_dict`` into tensors and plain values, without pickles.

    Returns:
        Tensors by ``<parameter>.<name>``, and the rest.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, OptimizerState(groups=tuple(state_dict["param_groups"]), values=values)


def join_optimizer_state(tensors: Mapping[str, Tensor], plain: OptimizerState) -> dict[str, Any]:
    """The inverse of :func:`split_optimizer_state`."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    for key, entries in plain.values.items():
        state.setdefault(int(key), {}).update(entries)
    groups = [
        {key: tuple(v) if key == "betas" else v for key, v in group.items()}
        for group in plain.groups
    ]
    return {"state": dict(sorted(state.items())), "param_groups": groups}
