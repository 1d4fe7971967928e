"""A vocabulary's rows in a lane's buffers, laid out so that vocabularies can share a capture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.runtime.families.base import BoundClasses
from zsseg_rt.runtime.workspace import Workspace


def bucket_of(num_phrases: int, most: int) -> int:
    """The number of rows that vocabularies of about this size share.

    8, 16, 32, 64, 128, 254, 512, 1024 and so on: with 255 classes, labels take two bytes.

    Example:
        >>> [bucket_of(number, 1000) for number in (1, 9, 254, 255, 600)]
        [8, 16, 254, 512, 1000]
    """
    return min(next(size for size in _sizes() if size >= num_phrases), max(most, num_phrases))


def _sizes() -> Iterator[int]:
    return chain((8, 16, 32, 64, 128, 254), (1 << power for power in count(9)))


def adopt_rows(
    classes: BoundClasses,
    num_rows: int | None,
    workspace: Workspace,
    *,
    text_dtype: str = "float32",
) -> BoundClasses:
    """Copy text embeddings, seen flags and the label table into a lane's buffers.

    On the CPU, arrays are used where they are, and the lane maps phrases to classes.

    Shapes:
        text_dtype: What the copied text embeddings are rounded to, ``"float32"`` or ``"float16"``.
    """
    if workspace.device == "cpu":
        return classes
    text_embeds = classes.text_embeds.astype(text_dtype, copy=False)
    vocabulary, phrases = classes.vocabulary, len(classes.vocabulary.phrases)
    rows = phrases if num_rows is None else num_rows
    table = vocabulary.label_table[:rows]
    seen = None if classes.seen is None else repeated_rows(np.asarray(classes.seen), rows)
    return replace(
        classes,
        text_embeds=workspace.upload("text_embeds", repeated_rows(text_embeds, rows)),
        seen=None if seen is None else workspace.upload("seen", seen),
        num_phrases=workspace.upload("num_phrases", np.array([phrases], np.int32)),
        label_table=workspace.upload(f"label_table {table.dtype}", table),
    )


def repeated_rows(values: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """So many rows: those beyond the last repeat it, which keeps them as finite as the others."""
    if rows == len(values):
        return values
    return values[np.minimum(np.arange(rows), len(values) - 1)]
