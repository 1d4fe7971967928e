"""COCO-Stuff 164k: the photos of COCO 2017 with 171 things and stuff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from zsseg_rt.evaluation.datasets.file_dataset import FileDataset, ValueTable
from zsseg_rt.evaluation.datasets.layout import Layout, pairs_of_folders, require_choice
from zsseg_rt.evaluation.datasets.splits import ClassTable, class_table

__all__ = ["cocostuff164k"]

LAYOUT = Layout(
    title="COCO-Stuff 164k",
    download=(
        "train2017.zip and val2017.zip from https://cocodataset.org/#download and "
        "stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff "
        "(unpacked as annotations/)"
    ),
    tree=("images/{train2017,val2017}/", "annotations/{train2017,val2017}/"),
    folders=("coco_stuff164k",),
    counts={"train": 118287, "val": 5000},
)


def cocostuff164k(
    root: str | Path,
    split: str = "train",
    *,
    unseen: Sequence[str] | None = None,
    convention: Literal["zegclip", "zegformer"] = "zegclip",
    partial: bool = False,
) -> FileDataset:
    """COCO-Stuff 164k: 171 classes, 156 seen and 15 unseen.

    Masks may be the published ones (``000000000009.png``, values 0..181) or those converted for
    MMSegmentation (``000000000009_labelTrainIds.png``, 0..170), which are preferred.

    Args:
        root: The folder with ``images`` and ``annotations``.
        split: ``"train"`` or ``"val"``.
        unseen: Names of the unseen classes; None takes the published split.
        convention: Order of the classes: of the masks, or ZegFormer's, seen before unseen.
        partial: Accept fewer images than published.

    Raises:
        DatasetError: Files are missing, or ``unseen`` names an unknown class.
        ArgumentError: There is no such split.
    """
    folder = LAYOUT.find(root)
    part = require_choice("split", split, ("train", "val")) + "2017"
    masks = LAYOUT.require(folder / "annotations" / part)
    converted = any(masks.glob("*_labelTrainIds.png"))
    suffix = "_labelTrainIds.png" if converted else ".png"
    pairs = pairs_of_folders(
        LAYOUT, folder / "images" / part, masks, image_suffix=".jpg", mask_suffix=suffix
    )
    table = _table(convention).with_unseen(unseen)
    values = table.values if converted or table.map_values is None else table.map_values
    return FileDataset(
        f"cocostuff164k/{split}",
        table,
        LAYOUT.check_pairs(pairs, split, folder, partial),
        ValueTable(values),
    )


def _table(convention: str) -> ClassTable:
    require_choice("convention", convention, ("zegclip", "zegformer"))
    table = class_table("cocostuff164k")
    return table if convention == "zegclip" else table.pick(table.seen + table.unseen)
