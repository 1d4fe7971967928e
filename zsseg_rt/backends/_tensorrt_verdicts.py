"""What a built plan says of itself: its layers, and what the golden sample once showed of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zsseg_rt.backends.base import GoldenVerdict, LayerInfo

# The inspector's names of element types -> NumPy's; longer names first.
_FORMAT_NAMES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "half": "float16",
    "float16": "float16",
    "fp8": "fp8",
    "float": "float32",
    "int8": "int8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
# Every version's fused attention, such as _gemm_mha_v2 and fmha_v2, but no name of ours: "/".
_FUSED = re.compile(r"(?<![a-z/])f?mha(?![a-z])", re.IGNORECASE)
_NAMED = ("Name", "LayerType", "TacticName")


def layer_info(entry: Any) -> LayerInfo:
    """A layer as the inspector reports it: only its name if the plan keeps no more."""
    if isinstance(entry, str):
        return LayerInfo(name=entry, type="", precision="")
    outputs = entry.get("Outputs") or [{}]
    format_name = str(outputs[0].get("Format/Datatype", "")).lower()
    precision = next((name for name in _FORMAT_NAMES if name in format_name), "")
    return LayerInfo(
        name=str(entry.get("Name", "")),
        type=str(entry.get("LayerType", "")),
        precision=_FORMAT_NAMES.get(precision, ""),
    )


def is_fused_attention(entry: Any) -> bool:
    """Whether a layer, as the inspector reports it, is one fused attention."""
    if isinstance(entry, str):
        return _FUSED.search(entry) is not None
    return any(_FUSED.search(str(entry.get(key, ""))) for key in _NAMED)


def read_verdict(stored: Mapping[str, Any] | None, sample: str) -> GoldenVerdict | None:
    """A stored verdict, if it is one and of this golden sample."""
    if stored is None or stored.get("sample") != sample:
        return None
    try:
        return GoldenVerdict(
            sample=sample,
            passed=stored["passed"] is True,
            stage=str(stored["stage"]),
            error=float(stored["error"]),
            tolerance=float(stored["tolerance"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
