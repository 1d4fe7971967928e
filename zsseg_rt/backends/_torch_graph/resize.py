"""ONNX's Resize in torch, for pictures [B, C, H, W], where torch has the same rule."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# (mode, coordinate transformation) -> torch's mode and whether corners are aligned
_SMOOTH = {
    ("linear", "half_pixel"): ("bilinear", False),
    ("linear", "pytorch_half_pixel"): ("bilinear", False),
    ("linear", "align_corners"): ("bilinear", True),
    ("cubic", "half_pixel"): ("bicubic", False),
    ("cubic", "pytorch_half_pixel"): ("bicubic", False),
    ("cubic", "align_corners"): ("bicubic", True),
}


def resize(
    attributes: dict[str, Any],
    x: Tensor,
    region: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Change height and width.

    Shapes:
        x: ``[B, C, H, W]``.
    """
    rule = _Rule(attributes)
    target = _target(attributes, x, scales, sizes)
    if rule.mode == "nearest":
        return _nearest(rule, x, target)
    known = _SMOOTH.get((rule.mode, rule.coordinates))
    single = rule.coordinates == "pytorch_half_pixel" and 1 in target["out"]
    if known is None or single or (rule.mode == "cubic" and rule.cubic != -0.75):
        raise rule.refusal()
    mode, aligned = known
    return F.interpolate(
        x, mode=mode, align_corners=aligned, antialias=rule.antialias, **_arguments(target)
    )


class _Rule:
    def __init__(self, attributes: dict[str, Any]) -> None:
        def word(name: str, default: str) -> str:
            return str(attributes.get(name, default.encode()).decode())

        self.mode = word("mode", "nearest")
        self.coordinates = word("coordinate_transformation_mode", "half_pixel")
        self.rounding = word("nearest_mode", "round_prefer_floor")
        self.cubic = attributes.get("cubic_coeff_a", -0.75)
        self.antialias = bool(attributes.get("antialias", 0))
        if word("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise ValueError("expected keep_aspect_ratio_policy='stretch', got another")
        excludes = bool(attributes.get("exclude_outside", 0))
        if excludes != self.antialias:  # torch leaves out what lies outside where it smooths only
            raise ValueError(f"expected exclude_outside={int(self.antialias)}, got {int(excludes)}")

    def refusal(self) -> ValueError:
        return ValueError(
            f"expected a rule that torch has, got mode {self.mode!r} with "
            f"{self.coordinates!r}, {self.rounding!r} and cubic_coeff_a={self.cubic}. "
            "Use backend 'openvino' or 'tensorrt'."
        )


def _target(
    attributes: dict[str, Any], x: Tensor, scales: Tensor | None, sizes: Tensor | None
) -> dict[str, Any]:
    """``out``: height and width; ``scale``: their factors, where the graph gives factors."""
    given = scales if sizes is None else sizes
    numbers = [] if given is None else given.tolist()
    axes = [axis % 4 for axis in attributes.get("axes", range(4))]
    by_axis = dict(zip(axes, numbers, strict=True))
    factors = sizes is None
    same = [1, 1, 1, 1] if factors else list(x.shape)
    batch, channels, height, width = (by_axis.get(axis, same[axis]) for axis in range(4))
    if x.ndim != 4 or [batch, channels] != same[:2]:
        raise ValueError("expected to change height and width of [B, C, H, W], got other axes")
    if not factors:
        return {"out": (height, width), "scale": None}
    out = (math.floor(x.shape[2] * height), math.floor(x.shape[3] * width))
    return {"out": out, "scale": (height, width)}


def _arguments(target: dict[str, Any]) -> dict[str, Any]:
    if target["scale"] is None:
        return {"size": target["out"]}
    return {"scale_factor": target["scale"], "recompute_scale_factor": False}


def _nearest(rule: _Rule, x: Tensor, target: dict[str, Any]) -> Tensor:
    if (rule.coordinates, rule.rounding) == ("asymmetric", "floor"):
        return F.interpolate(x, mode="nearest", **_arguments(target))
    if rule.coordinates != "half_pixel" or not rule.rounding.startswith("round_prefer"):
        raise rule.refusal()
    # torch rounds halves up
    pairs = zip(x.shape[2:], target["out"], target["scale"] or (None, None), strict=True)
    if rule.rounding == "round_prefer_floor" and any(_has_halves(*pair) for pair in pairs):
        raise rule.refusal()
    return F.interpolate(x, mode="nearest-exact", **_arguments(target))


def _has_halves(size: int, out: int, scale: float | None) -> bool:
    """Whether a result's place lies in the middle between two places of the input."""
    factor = scale or out / size
    return any(((place + 0.5) / factor - 0.5) % 1 == 0.5 for place in range(out))
