"""Plans that TensorRT-RTX builds without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from zsseg_rt import Bundle


def fused_kernels(plan: Any) -> tuple[int, int]:
    """How often each of RTX 1.7's two names of fused attention stands in a plan."""
    return plan.data.count(b"fmha_v2"), plan.data.count(b"flash_attention_nl_tiled")


def build_image_encoder_plan(
    bundle: Path, precision: str, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Any:
    """A bundle's image encoder as a plan; all its products are in the precision."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install '.[rtx]'")
    from zsseg_rt.backends._tensorrt import BACKEND
    from zsseg_rt.backends.base import BackendOptions

    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")
    entry = Bundle.load(bundle).graphs["image_encoder"][precision]
    file = bundle / entry.file
    options = BackendOptions(compute_capability="8.9", **settings)
    plan = BACKEND.build_plan(file, precision=precision, options=options)
    report = plan.report
    multiplied = {row["dtype"] for row in report["layers"] if row["type"] == "MATRIX_MULTIPLY"}
    assert multiplied == {precision}
    stated = [(spec.name, spec.dtype) for spec in (*entry.inputs, *entry.outputs)]
    assert [(row["name"], row["dtype"]) for row in report["inputs"] + report["outputs"]] == stated
    return plan
