"""NumPy definition of :func:`zsseg_rt.ops.blend_cosines`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array
from zsseg_rt.ops._sampling import ABSENT_LOGIT, out_or_new

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
    logits = mask_logits
    result = out_or_new(out, logits.shape, np.float32)
    kept = ~(np.abs(logits) < -ABSENT_LOGIT)
    share = shares.astype(np.float64)[:, None, None]
    apart = kept | ~(share > 0)
    wide = np.where(kept, -np.inf, logits.astype(np.float64))
    near = np.where(kept, -np.inf, cosines.astype(np.float64))
    sigmoid = activation == "sigmoid"
    total = _log_sum(np.where(apart, -np.inf, wide))
    mask_logs = -np.logaddexp(0.0, -wide) if sigmoid else wide - total
    with np.errstate(divide="ignore"):
        cosine_logs = near - _log_sum(np.where(apart, -np.inf, near + np.log(share)))
    weight = weights.astype(np.float64)[:, None, None]
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
