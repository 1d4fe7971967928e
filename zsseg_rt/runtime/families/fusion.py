"""From two opinions about every segment to its class scores, in NumPy: a few thousand numbers.

Source: Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022, and its official code.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

_TRUSTED = np.float32(2 / 3)  # exponent of the more trusted opinion
_OTHER = np.float32(1 / 3)


def class_probabilities(logits: FloatArray, no_object: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Softmax over classes and "no object".

    Shapes:
        logits: float32 [P, Q].
        no_object: float32 [Q], the logit of "no object".

    Returns:
        Probabilities of the classes [P, Q], and of being any class [Q]; NaN where a logit is NaN
        or positive infinity.
    """
    peak = np.maximum(logits.max(axis=0), no_object)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: the caller checks for NaN
        terms, rest = np.exp(logits - peak), np.exp(no_object - peak)
    total = terms.sum(axis=0)
    return terms / (total + rest), total / (total + rest)


def fuse(
    by_text: FloatArray,
    by_region: FloatArray | None,
    fusion: str,
    seen: npt.NDArray[np.bool_] | None,
) -> FloatArray:
    """Weigh the two opinions; see :class:`zsseg_rt.bundles.specs.RegionSpec`.

    Shapes:
        by_text: Class probabilities of the segments themselves, float32 [P, Q].
        by_region: Those from the region encoder, float32 [P, Q]; None without one.
        seen: bool [P], classes that training saw; None if there are none.

    Returns:
        float32 [P, Q], in [0, 1]; columns do not sum to one.
    """
    if by_region is None or fusion == "segments":
        return by_text
    if fusion == "regions":
        return by_region
    fused: FloatArray = by_text**_OTHER * by_region**_TRUSTED
    if fusion == "seen_and_unseen" and seen is not None and seen.any():
        mean = by_region[seen].mean(axis=0)
        fused[seen] = by_text[seen] ** _TRUSTED * mean**_OTHER
    return fused
