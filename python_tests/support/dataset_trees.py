"""Published data sets as tiny trees, and the files that they are made of."""

import numpy as np
from PIL import Image

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


def build_context(root):
    base = root / "VOC2010"
    for split, name in (("train", "2008_1"), ("val", "2008_2")):
        photo(base / "JPEGImages" / f"{name}.jpg")
        mask(base / "SegmentationClassContext" / f"{name}.png", [0, 1, 59, 255])
        listing(base / "ImageSets" / "SegmentationContext" / f"{split}.txt", [name])


def build_ade20k(root):
    base = root / "ADEChallengeData2016"
    for part, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        photo(base / "images" / part / f"{name}.jpg")
        mask(base / "annotations" / part / f"{name}.png", [0, 1, 150])


def build_ade20k_full(root):
    for part, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        photo(root / "images_detectron2" / part / f"{name}.jpg")
        mask(root / "annotations_detectron2" / part / f"{name}.tif", [0, 846, 65535])


def build_cityscapes(root):
    for place in ("train/aachen", "train/bonn", "val/aachen", "val/bonn"):
        stem = f"{place.rpartition('/')[2]}_000000_000019"
        photo(root / "leftImg8bit" / place / f"{stem}_leftImg8bit.png")
        mask(root / "gtFine" / place / f"{stem}_gtFine_labelIds.png", [0, 7, 33, 3, 31])
        mask(root / "gtFine" / place / f"{stem}_gtFine_instanceIds.png", [0, 7, 26001])


def build_camvid(root):
    for split in ("train", "val", "test"):
        photo(root / split / "0001TP_1.png")
        mask(root / f"{split}annot" / "0001TP_1.png", [0, 4, 10, 11])


BUILDERS = {
    "ade20k": build_ade20k,
    "ade20k_full": build_ade20k_full,
    "camvid": build_camvid,
    "cityscapes": build_cityscapes,
    "cocostuff164k": build_cocostuff,
    "coco-object": build_cocostuff,
    "coco-stuff": build_cocostuff,
    "context": build_context,
    "context59": build_context,
    "context60": build_context,
    "voc2012": build_voc,
    "voc20": build_voc,
    "voc21": build_voc,
}
