"""Runs that take seconds, with a tiny CLIP file and two steps, and tiny data sets."""

import atexit
import shutil
import tempfile
from functools import partial

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from support import tiny
from tools.scenes import write_folder
from zsseg_rt.training.config import TrainConfig

SCENES = write_folder(
    tempfile.mkdtemp(prefix="scenes-"), {"train": 8, "val": 8, "train_seen": 8}, size=64
)
"""A folder data set of the synthetic world."""
atexit.register(shutil.rmtree, SCENES, ignore_errors=True)

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77)
TABLES = {
    "data": {
        "name": "folder",
        "root": str(SCENES),
        "augmentation": {"kind": "center_crop", "crop_hw": [64, 64], "short_edge": 64},
    },
    "loop": {
        "iterations": 2,
        "batch_size": 2,
        "checkpoint_interval": 2,
        "num_workers": 0,
        "num_pictures": 0,
        "device": "cpu",
    },
}
"""Of a configuration; without a model."""
STUDENT = {"width": 32}
STUDENT |= dict.fromkeys(("num_heads", "decoder_heads", "head_heads"), 2)
STUDENT |= {"num_layers": 1, "decoder_layers": 1, "decoder_width": 16}
STUDENT |= {"grid_side": 4, "group_tokens": [4, 2]}
"""A small ZeroSeg."""


def save_clip(path):
    """Write a tiny CLIP with the standard vocabulary; its activation is quick_gelu."""
    save_file({k: v.contiguous() for k, v in tiny.clip_state_dict(SIZES).items()}, path)
    return path


def settings(root, clip_file="none.safetensors", **tables):
    """Of a run on a folder; ``tables`` add to them."""
    options = {"pretrained": str(clip_file), "activation": "quick_gelu", "image_size": 64}
    plain = {
        "data": {"name": "folder", "root": str(root)},
        "model": {"options": options | {"num_prompts": 2}},
        "loop": {"iterations": 60, "batch_size": 1, "num_workers": 0, "device": "cpu"},
        "evaluation": {"split": "val"},
        "output": {"folder": str(root.parent / "run")},
    }
    for table, fields in tables.items():
        plain.setdefault(table, {}).update(fields)
    return TrainConfig.from_dict(plain)


# --- published data sets as tiny trees, and the files that they are made of ---

HW = (12, 16)


def photo(path, size_hw=HW, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path, values, size_hw=HW, *, palette=False):
    """A mask whose rows repeat the values in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if max(values) > 255 or path.suffix == ".tif" else np.uint8
    rows = np.resize(np.asarray(values, dtype), size_hw[0])
    array = np.repeat(rows[:, None], size_hw[1], 1)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(np.random.default_rng(1).bytes(768))
    image.save(path)


def listing(path, names):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def rows_of(dataset, index=0):
    """The label of each row of a sample made by :func:`mask`."""
    sample = dataset[index]
    assert sample.image.dtype == np.uint8
    assert sample.image.shape == (*sample.labels.shape, 3)
    assert (sample.labels == sample.labels[:, :1]).all()
    return sample.labels[:, 0].tolist()


# --- the known sets: one function builds a tiny tree of each ---


def build_voc(root):
    base = root / "VOCdevkit" / "VOC2012"
    for name in ("2007_1", "2007_2", "2008_3"):
        photo(base / "JPEGImages" / f"{name}.jpg")
    lists = {"train": "2007_1", "val": "2007_2", "aug": "2008_3", "trainaug": "2007_1 2008_3"}
    for split, names in lists.items():
        listing(base / "ImageSets" / "Segmentation" / f"{split}.txt", names.split())
    mask(base / "SegmentationClass" / "2007_1.png", [0, 1, 20, 255], palette=True)
    mask(base / "SegmentationClass" / "2007_2.png", [5, 0], palette=True)
    mask(base / "SegmentationClassAug" / "2007_1.png", [0, 2])
    mask(base / "SegmentationClassAug" / "2008_3.png", [16, 0])
    return base


def build_cocostuff(root, *, converted=True, values=(0, 12, 181, 255)):
    for part in ("train2017", "val2017"):
        photo(root / "images" / part / "000000000009.jpg")
        raw = root / "annotations" / part / "000000000009.png"
        mask(raw, values)
        if converted:
            mask(raw.with_name("000000000009_labelTrainIds.png"), [0, 11, 170, 255])


TREES = {  # folder, photos, masks, names of both, and what masks hold
    "ade20k": (
        "ADEChallengeData2016", "images/{}.jpg", "annotations/{}.png",
        ("training/ADE_train_1", "validation/ADE_val_1"), [0, 1, 150],
    ),
    "ade20k_full": (
        "", "images_detectron2/{}.jpg", "annotations_detectron2/{}.tif",
        ("training/ADE_train_1", "validation/ADE_val_1"), [0, 846, 65535],
    ),
    "camvid": (
        "", "{}/0001TP_1.png", "{}annot/0001TP_1.png", ("train", "val", "test"), [0, 4, 10, 11],
    ),
    "cityscapes": (
        "", "leftImg8bit/{}_0_leftImg8bit.png", "gtFine/{}_0_gtFine_labelIds.png",
        ("train/aachen/a_0", "train/bonn/b_0", "val/aachen/a_0", "val/bonn/b_0"), [0, 7, 33, 3, 31],
    ),
    "context": (
        "VOC2010", "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png", ("train", "val"),
        [0, 1, 59, 255],
    ),
}  # fmt: skip


def build(name, root):
    folder, photos, masks, names, values = TREES[name]
    for stem in names:
        photo(root / folder / photos.format(stem))
        mask(root / folder / masks.format(stem), values)
        if name == "cityscapes":
            instances = masks.format(stem).replace("labelIds", "instanceIds")
            mask(root / instances, [0, 7, 26001])
        if name == "context":
            listing(root / "VOC2010/ImageSets/SegmentationContext" / f"{stem}.txt", [stem])


BUILDERS = {
    **{name: partial(build, name) for name in TREES},
    **dict.fromkeys(("context59", "context60"), partial(build, "context")),
    **dict.fromkeys(("cocostuff164k", "coco-object", "coco-stuff"), build_cocostuff),
    **dict.fromkeys(("voc2012", "voc20", "voc21"), build_voc),
}
