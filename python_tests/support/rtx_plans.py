"""Plans that TensorRT-RTX builds without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zsseg_rt.backends._tensorrt import BACKEND
from zsseg_rt.backends.base import BackendOptions


def fused_kernels(plan: Any) -> tuple[int, int]:
    """How often each of RTX 1.7's two names of fused attention stands in a plan."""
    return plan.data.count(b"fmha_v2"), plan.data.count(b"flash_attention_nl_tiled")


def build_plan(path: Path, precision: str, **options: Any) -> Any:
    """A plan: products in the precision, norms and softmax in float32; for 8.9 if unsaid."""
    options = BackendOptions(**{"compute_capability": "8.9", **options})
    plan = BACKEND.build_plan(path, precision=precision, options=options)
    assert plan.report["precision"] == precision
    dtypes = {row["type"]: set() for row in plan.report["layers"]}
    for row in plan.report["layers"]:
        dtypes[row["type"]].add(row["dtype"])
    assert dtypes["MATRIX_MULTIPLY"] == dtypes.get("CONVOLUTION", {precision}) == {precision}
    for kind in ("NORMALIZATION", "SOFTMAX"):
        assert dtypes.get(kind, {"float32"}) == {"float32"}
    return plan
