"""Plans that TensorRT-RTX builds without a GPU, and the key of one that nobody built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zsseg_rt import Bundle

PLAN_KEY = {
    "graph_name": "decoder", "graph_sha256": "ab" * 32, "runtime": "tensorrt-10.3.0",
    "target": "sm87-Orin", "precision": "float16", "shapes": {"classes": (1, 32, 1024)},
}  # fmt: skip


def fused_kernels(plan: Any) -> tuple[int, int]:
    """How often each of RTX 1.7's two names of fused attention stands in a plan."""
    return plan.data.count(b"fmha_v2"), plan.data.count(b"flash_attention_nl_tiled")


def build_plan(
    bundle: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    graph: str = "image_encoder",
    **settings: Any,
) -> Any:
    """A bundle's graph as a plan: products in the precision, norms and softmax in float32."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install '.[rtx]'")
    from zsseg_rt.backends._tensorrt import BACKEND
    from zsseg_rt.backends.base import BackendOptions

    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")
    entry = Bundle.load(bundle).graphs[graph][precision]
    file = bundle / entry.file
    options = BackendOptions(compute_capability="8.9", **settings)
    plan = BACKEND.build_plan(file, precision=precision, options=options)
    report = plan.report
    dtypes = {row["type"]: set() for row in report["layers"]}
    for row in report["layers"]:
        dtypes[row["type"]].add(row["dtype"])
    assert dtypes["MATRIX_MULTIPLY"] == dtypes.get("CONVOLUTION", {precision}) == {precision}
    for kind in ("NORMALIZATION", "SOFTMAX"):
        assert dtypes.get(kind, {"float32"}) == {"float32"}
    stated = [(spec.name, spec.dtype) for spec in (*entry.inputs, *entry.outputs)]
    assert [(row["name"], row["dtype"]) for row in report["inputs"] + report["outputs"]] == stated
    return plan
