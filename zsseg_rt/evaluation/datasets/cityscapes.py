"""Cityscapes with fine annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsseg_rt.evaluation.datasets.file_dataset import FileDataset, ValueTable
from zsseg_rt.evaluation.datasets.layout import Layout, pairs_of_folders, require_choice
from zsseg_rt.evaluation.datasets.splits import class_table

__all__ = ["cityscapes"]

LAYOUT = Layout(
    title="Cityscapes",
    download=(
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from "
        "https://www.cityscapes-dataset.com/downloads/ (after registration)"
    ),
    tree=(
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png",
        "gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
    ),
    folders=("cityscapes",),
    counts={"train": 2975, "val": 500},
)

NUM_IDS = 34  # values of _labelIds.png; those that are not evaluated count as not annotated


def cityscapes(
    root: str | Path,
    split: str = "train",
    *,
    unseen: Sequence[str] | None = None,
    partial: bool = False,
) -> FileDataset:
    """Cityscapes: 19 classes, all seen, because no zero-shot split of them is published.

    Args:
        root: The folder with ``leftImg8bit`` and ``gtFine``.
        split: ``"train"`` or ``"val"``.
        unseen: Names of the unseen classes; None for none.
        partial: Accept fewer images than published.

    Raises:
        DatasetError: Files are missing, or ``unseen`` names an unknown class.
        ArgumentError: There is no such split.
    """
    folder = LAYOUT.find(root)
    require_choice("split", split, ("train", "val"))
    pairs = pairs_of_folders(
        LAYOUT,
        folder / "leftImg8bit" / split,
        folder / "gtFine" / split,
        image_suffix="_leftImg8bit.png",
        mask_suffix="_gtFine_labelIds.png",
        recursive=True,
    )
    table = class_table("cityscapes").with_unseen(unseen)
    ignored = [value for value in (*range(NUM_IDS), 255) if value not in table.values]
    pairs_checked = LAYOUT.check_pairs(pairs, split, folder, partial)
    return FileDataset(
        f"cityscapes/{split}", table, pairs_checked, ValueTable(table.values, ignored)
    )
