"""Masks without the names that are left out of a frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from zsseg_rt.ops.reference_blend import LARGEST_LOG
from zsseg_rt.runtime.families.base import BoundClasses, Masks
from zsseg_rt.runtime.families.masks import ClassLogits
from zsseg_rt.runtime.workspace import Workspace

Maps = npt.NDArray[np.float32]


def cut(
    masks: Masks,
    classes: BoundClasses,
    workspace: Workspace,
) -> tuple[Masks, BoundClasses]:
    """Masks and classes without the phrases that the gate leaves out; waits for the masks.

    Where cosines count beside masks, they become shares among the phrases that stay.

    Returns:
        As given if nothing is left out. Labels of the others are classes, by a table.
    """
    gate = classes.gate
    assert gate is not None, "nothing is left out"
    assert isinstance(masks, ClassLogits), "other families were refused"
    vocabulary, phrases = classes.vocabulary, len(classes.vocabulary.phrases)
    logits = workspace.fetch(masks.mask_logits)[:, :phrases]
    rows = gate.rows
    if rows is None:
        # Cells differ in how large all their logits are: a share of the cell can be compared.
        cells = logits[0].reshape(phrases, -1)
        rows = gate.choose((cells - _log_sum(cells)).max(axis=1), vocabulary)
    if len(rows) == phrases:
        return masks, classes
    seen, table = gate.seen, vocabulary.label_table[rows]
    kept = np.ascontiguousarray(logits[:, rows], np.float32)
    if classes.cosine is not None and masks.cosines is not None:
        bound = (classes.cosine.weights, classes.cosine.shares)
        weights, shares = (workspace.fetch(array)[:phrases] for array in bound)
        cosines = workspace.fetch(masks.cosines)[0, :phrases] + np.log(shares)[:, None, None]
        share = _log_sum(cosines[rows]) - _log_sum(cosines)
        kept = _reweighted(kept, weights[rows][:, None, None] * share)
    named = replace(
        classes,
        seen=None if seen is None else workspace.upload("kept seen", np.asarray(seen)[rows]),
        num_phrases=None,
        label_table=workspace.upload(f"kept label_table {table.dtype}", table),
    )
    cut_masks = replace(masks, mask_logits=workspace.upload("kept logits", kept), cosines=None)
    return cut_masks, named


def _log_sum(logits: Maps) -> Maps:
    """Logarithm of the sum of exponentials over the first axis."""
    top = logits.max(axis=0)
    total: Maps = top + np.log(np.exp(logits - top).sum(axis=0))
    return total


def _reweighted(logits: Maps, less: Maps) -> Maps:
    """Log-odds of probabilities whose logarithms have become smaller by ``less``."""
    logs = np.minimum(-np.logaddexp(np.float32(0.0), -logits) - less, LARGEST_LOG)
    odds: Maps = logs - np.log(-np.expm1(logs))
    return odds.astype(np.float32)
