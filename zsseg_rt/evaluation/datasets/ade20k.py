"""ADE20K: the benchmark with 150 classes, and the full set with 847."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsseg_rt.evaluation.datasets.file_dataset import FileDataset, ValueTable
from zsseg_rt.evaluation.datasets.layout import Layout, pairs_of_folders, require_choice
from zsseg_rt.evaluation.datasets.splits import class_table

__all__ = ["ade20k", "ade20k_full"]

PARTS = {"train": "training", "val": "validation"}

LAYOUT = Layout(
    title="ADE20K (150 classes)",
    download="ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu/",
    tree=("images/{training,validation}/", "annotations/{training,validation}/"),
    folders=("ADEChallengeData2016",),
    counts={"train": 20210, "val": 2000},
)

FULL_LAYOUT = Layout(
    title="ADE20K-Full (847 classes)",
    download=(
        "ADE20K_2021_17_01.zip from https://groups.csail.mit.edu/vision/datasets/ADE20K/ and "
        "prepare it with prepare_ade20k_full_sem_seg.py of "
        "https://github.com/facebookresearch/MaskFormer"
    ),
    tree=(
        "images_detectron2/{training,validation}/",
        "annotations_detectron2/{training,validation}/",
    ),
    folders=("ADE20K_2021_17_01",),
    counts={"train": 25574, "val": 2000},
)


def ade20k(
    root: str | Path,
    split: str = "train",
    *,
    unseen: Sequence[str] | None = None,
    partial: bool = False,
) -> FileDataset:
    """ADE20K with 150 classes, all seen, because no zero-shot split of them is published.

    Args:
        root: The folder ADEChallengeData2016, or one that holds it.
        split: ``"train"`` or ``"val"``.
        unseen: Names of the unseen classes; None for none.
        partial: Accept fewer images than published.

    Raises:
        DatasetError: Files are missing, or ``unseen`` names an unknown class.
        ArgumentError: There is no such split.
    """
    folder = LAYOUT.find(root)
    part = PARTS[require_choice("split", split, PARTS)]
    pairs = pairs_of_folders(
        LAYOUT, folder / "images" / part, folder / "annotations" / part, image_suffix=".jpg"
    )
    table = class_table("ade20k").with_unseen(unseen)
    pairs_checked = LAYOUT.check_pairs(pairs, split, folder, partial)
    return FileDataset(f"ade20k/{split}", table, pairs_checked, ValueTable(table.values, (0, 255)))


def ade20k_full(
    root: str | Path,
    split: str = "train",
    *,
    unseen: Sequence[str] | None = None,
    partial: bool = False,
) -> FileDataset:
    """ADE20K-Full: 847 classes, 572 frequent or common ones seen and 275 rare ones unseen.

    Large images were shrunk to a short side of 512 when the set was prepared, as for the published
    figures. Labels are uint16; 65535 means not annotated.

    Args:
        root: The folder ADE20K_2021_17_01, or one that holds it.
        split: ``"train"`` or ``"val"``.
        unseen: Names of the unseen classes; None takes ZegFormer's split.
        partial: Accept fewer images than published.

    Raises:
        DatasetError: Files are missing, or ``unseen`` names an unknown class.
        ArgumentError: There is no such split.
    """
    folder = FULL_LAYOUT.find(root)
    part = PARTS[require_choice("split", split, PARTS)]
    pairs = pairs_of_folders(
        FULL_LAYOUT,
        folder / "images_detectron2" / part,
        folder / "annotations_detectron2" / part,
        image_suffix=".jpg",
        mask_suffix=".tif",
    )
    table = class_table("ade20k_full").with_unseen(unseen)
    pairs_checked = FULL_LAYOUT.check_pairs(pairs, split, folder, partial)
    return FileDataset(
        f"ade20k_full/{split}", table, pairs_checked, ValueTable(table.values, (65535,))
    )
