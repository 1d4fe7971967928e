"""PASCAL VOC 2012, with the extra annotations of SBD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from zsseg_rt.evaluation.datasets.file_dataset import FileDataset, ValueTable
from zsseg_rt.evaluation.datasets.layout import Layout, pairs_of_list, require_choice
from zsseg_rt.evaluation.datasets.splits import ClassTable, class_table

__all__ = ["voc2012"]

LAYOUT = Layout(
    title="PASCAL VOC 2012",
    download=(
        "VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, and for "
        "split 'train' the SBD annotations as PNG (SegmentationClassAug) with the list aug.txt: "
        "http://home.bharathh.info/pubs/codes/SBD/download.html, converted by MMSegmentation's "
        "voc_aug.py"
    ),
    tree=(
        "JPEGImages/",
        "SegmentationClass/",
        "SegmentationClassAug/",
        "ImageSets/Segmentation/{train,aug,trainaug,val,trainval}.txt",
    ),
    folders=("VOC2012", "VOCdevkit/VOC2012"),
    counts={"train": 10582, "trainaug": 10582, "train_voc": 1464, "val": 1449, "trainval": 2913},
)

# Each split: lists with the folder of their masks.
SPLITS = {
    "train": (("train", "SegmentationClass"), ("aug", "SegmentationClassAug")),
    "trainaug": (("trainaug", "SegmentationClassAug"),),
    "train_voc": (("train", "SegmentationClass"),),
    "val": (("val", "SegmentationClass"),),
    "trainval": (("trainval", "SegmentationClass"),),
}


def voc2012(
    root: str | Path,
    split: str = "train",
    *,
    unseen: Sequence[str] | None = None,
    convention: Literal["zegclip", "zegformer"] = "zegclip",
    partial: bool = False,
) -> FileDataset:
    """PASCAL VOC 2012: 20 classes, 15 seen and 5 unseen; background is not annotated.

    Args:
        root: The folder VOC2012, or one that holds it or VOCdevkit.
        split: ``"train"`` (VOC's own masks for train.txt, SBD's for aug.txt: what ZegCLIP trains
            on), ``"trainaug"`` (trainaug.txt with SBD masks), ``"train_voc"`` (VOC's own only),
            ``"val"`` or ``"trainval"``.
        unseen: Names of the unseen classes; None takes the published split.
        convention: ZegFormer's prompts say "potted plant", the others' "pottedplant".
        partial: Accept fewer images than published.

    Raises:
        DatasetError: Files are missing, or ``unseen`` names an unknown class.
        ArgumentError: There is no such split.
    """
    folder = LAYOUT.find(root)
    lists = SPLITS[require_choice("split", split, SPLITS)]
    pairs = [
        pair
        for name, masks in lists
        for pair in pairs_of_list(
            LAYOUT,
            folder / "ImageSets" / "Segmentation" / f"{name}.txt",
            folder / "JPEGImages",
            folder / masks,
        )
    ]
    table = _table(convention).with_unseen(unseen)
    pairs_checked = LAYOUT.check_pairs(pairs, split, folder, partial)
    return FileDataset(f"voc2012/{split}", table, pairs_checked, ValueTable(table.values, (0, 255)))


def _table(convention: str) -> ClassTable:
    require_choice("convention", convention, ("zegclip", "zegformer"))
    table = class_table("voc2012")
    if convention == "zegclip":
        return table
    names = ("potted plant" if name == "pottedplant" else name for name in table.names)
    return replace(table, names=tuple(names))
