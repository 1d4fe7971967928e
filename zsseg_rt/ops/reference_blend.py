"""NumPy definition of :func:`zsseg_rt.ops.blend_cosines`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from zsseg_rt.arrays import Array
from zsseg_rt.ops._contract import (
    ABSENT_LOGIT,
    expect_array,
    expect_logits,
    expect_out,
    expect_shape,
    fail_argument,
)
from zsseg_rt.ops._overlap import expect_apart

__all__ = ["LARGEST_LOG", "blend_cosines"]

LARGEST_LOG = -1e-6
"""Logarithm of the largest probability that is told from 1: log-odds stay below 14."""


def blend_cosines(
    mask_logits: Array,
    cosines: Array,
    weights: Array,
    shares: Array,
    *,
    activation: str = "sigmoid",
    out: Array | None = None,
    stream: int = 0,
) -> npt.NDArray[np.float32]:
    """Reference of :func:`zsseg_rt.ops.blend_cosines`, in float64."""
    if activation not in ("sigmoid", "softmax"):
        fail_argument("activation", "'sigmoid' or 'softmax'", f"'{activation}'")
    logits = expect_logits("mask_logits", mask_logits, "float32")
    columns = {"cosines": (cosines, logits.shape), "weights": (weights, (logits.shape[1],))}
    columns["shares"] = (shares, (logits.shape[1],))
    checked = {name: expect_array(name, given, "float32") for name, (given, _) in columns.items()}
    for name, (_, shape) in columns.items():
        expect_shape(name, checked[name], shape)
    inputs = {"mask_logits": logits, **checked}
    expect_apart({"out": out}, inputs, in_place=("mask_logits", "cosines"))
    result = expect_out("out", out, logits.shape, np.float32)
    kept = ~(np.abs(logits) < -ABSENT_LOGIT)
    share = checked["shares"].astype(np.float64)[:, None, None]
    apart = kept | ~(share > 0)
    wide = np.where(kept, -np.inf, logits.astype(np.float64))
    near = np.where(kept, -np.inf, checked["cosines"].astype(np.float64))
    sigmoid = activation == "sigmoid"
    total = _log_sum(np.where(apart, -np.inf, wide))
    mask_logs = -np.logaddexp(0.0, -wide) if sigmoid else wide - total
    with np.errstate(divide="ignore"):
        cosine_logs = near - _log_sum(np.where(apart, -np.inf, near + np.log(share)))
    weight = checked["weights"].astype(np.float64)[:, None, None]
    with np.errstate(invalid="ignore", divide="ignore"):  # where nothing is blended
        logs = np.minimum((1.0 - weight) * mask_logs + weight * cosine_logs, LARGEST_LOG)
        odds = logs - np.log(-np.expm1(logs))
    result[...] = np.where(kept, logits, odds)
    return result


def _log_sum(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Logarithm of the sum of exponentials over axis 1, kept; 0 where every class is absent."""
    peak = values.max(axis=1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    total = np.exp(values - peak).sum(axis=1, keepdims=True)
    return np.asarray(peak + np.log(np.maximum(total, 1e-300)))
