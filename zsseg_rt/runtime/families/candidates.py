"""Masks without the names that are left out of a frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

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
    named = replace(
        classes,
        seen=None if seen is None else workspace.upload("kept seen", np.asarray(seen)[rows]),
        num_phrases=None,
        label_table=workspace.upload(f"kept label_table {table.dtype}", table),
    )
    return replace(masks, mask_logits=workspace.upload("kept logits", kept)), named


def _log_sum(logits: Maps) -> Maps:
    """Logarithm of the sum of exponentials over the first axis."""
    top = logits.max(axis=0)
    total: Maps = top + np.log(np.exp(logits - top).sum(axis=0))
    return total
