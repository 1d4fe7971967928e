"""PASCAL Context: VOC 2010 photos with 59 classes and background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsseg_rt.evaluation.datasets.file_dataset import FileDataset, ValueTable
from zsseg_rt.evaluation.datasets.layout import Layout, pairs_of_list, require_choice
from zsseg_rt.evaluation.datasets.splits import class_table

__all__ = ["pascal_context"]

LAYOUT = Layout(
    title="PASCAL Context",
    download=(
        "VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ and the "
        "annotations from https://cs.stanford.edu/~roozbeh/pascal-context/, converted to PNG by "
        "MMSegmentation's pascal_context.py"
    ),
    tree=(
        "JPEGImages/",
        "SegmentationClassContext/",
        "ImageSets/SegmentationContext/{train,val}.txt",
    ),
    folders=("VOC2010", "VOCdevkit/VOC2010"),
    counts={"train": 4996, "val": 5104},
)


def pascal_context(
    root: str | Path,
    split: str = "train",
    *,
    background: bool = False,
    unseen: Sequence[str] | None = None,
    partial: bool = False,
) -> FileDataset:
    """PASCAL Context: 59 classes (10 unseen), or 60 with background as a seen class.

    Args:
        root: The folder VOC2010, or one that holds it or VOCdevkit.
        split: ``"train"`` or ``"val"``.
        background: Whether background, mask value 0, is a class; otherwise it is not annotated.
        unseen: Names of the unseen classes; None takes the split that papers report on.
        partial: Accept fewer images than published.

    Raises:
        DatasetError: Files are missing, or ``unseen`` names an unknown class.
        ArgumentError: There is no such split.
    """
    folder = LAYOUT.find(root)
    require_choice("split", split, ("train", "val"))
    pairs = pairs_of_list(
        LAYOUT,
        folder / "ImageSets" / "SegmentationContext" / f"{split}.txt",
        folder / "JPEGImages",
        folder / "SegmentationClassContext",
    )
    table = class_table("pascal_context")
    if not background:
        table = table.pick(range(1, len(table.names)))
    table = table.with_unseen(unseen)
    return FileDataset(
        f"context{len(table.names)}/{split}",
        table,
        LAYOUT.check_pairs(pairs, split, folder, partial),
        ValueTable(table.values, (255,) if background else (0, 255)),
    )
