"""Published layouts, read from tiny trees, and what is said about incomplete ones."""

import numpy as np
import pytest
from PIL import Image

from zsseg_rt.errors import ArgumentError, DatasetError
from zsseg_rt.training.datasets import DATASETS, SegmentationDataset, create_dataset
from zsseg_rt.training.datasets.splits import class_table

HW = (12, 16)


def photo(path, size_hw=HW, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size_hw, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def mask(path, values, size_hw=HW, *, palette=False):
    """A mask whose rows repeat the values in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if max(values) > 255 or path.suffix == ".tif" else np.uint8
    rows = np.resize(np.asarray(values, dtype), size_hw[0])
    array = np.repeat(rows[:, None], size_hw[1], 1)
    image = Image.fromarray(array)
    if palette:
        image = Image.fromarray(array, "L").convert("P")
        image.putdata(array.ravel().tolist())
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    image.save(path)
    return array


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
    lists = base / "ImageSets" / "Segmentation"
    listing(lists / "train.txt", ["2007_1"])
    listing(lists / "val.txt", ["2007_2"])
    listing(lists / "aug.txt", ["2008_3"])
    listing(lists / "trainaug.txt", ["2007_1", "2008_3"])
    mask(base / "SegmentationClass" / "2007_1.png", [0, 1, 20, 255], palette=True)
    mask(base / "SegmentationClass" / "2007_2.png", [5, 0], palette=True)
    mask(base / "SegmentationClassAug" / "2007_1.png", [0, 2])
    mask(base / "SegmentationClassAug" / "2008_3.png", [16, 0])
    return base


def build_cocostuff(root, *, converted=True, values=None):
    for part in ("train2017", "val2017"):
        photo(root / "images" / part / "000000000009.jpg")
        raw = root / "annotations" / part / "000000000009.png"
        mask(raw, values or [0, 12, 181, 255])
        if converted:
            mask(raw.with_name("000000000009_labelTrainIds.png"), [0, 11, 170, 255])
    return root


def build_context(root):
    base = root / "VOC2010"
    for split, name in (("train", "2008_1"), ("val", "2008_2")):
        photo(base / "JPEGImages" / f"{name}.jpg")
        mask(base / "SegmentationClassContext" / f"{name}.png", [0, 1, 59, 255])
        listing(base / "ImageSets" / "SegmentationContext" / f"{split}.txt", [name])
    return base


def build_ade20k(root):
    base = root / "ADEChallengeData2016"
    for part, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        photo(base / "images" / part / f"{name}.jpg")
        mask(base / "annotations" / part / f"{name}.png", [0, 1, 150])
    return base


def build_ade20k_full(root):
    for part, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        photo(root / "images_detectron2" / part / f"{name}.jpg")
        mask(root / "annotations_detectron2" / part / f"{name}.tif", [0, 846, 65535])
    return root


def build_cityscapes(root):
    for split in ("train", "val"):
        for city in ("aachen", "bonn"):
            stem = f"{city}_000000_000019"
            photo(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
            fine = root / "gtFine" / split / city
            mask(fine / f"{stem}_gtFine_labelIds.png", [0, 7, 33, 3, 31])
            mask(fine / f"{stem}_gtFine_instanceIds.png", [0, 7, 26001])
    return root


def build_camvid(root):
    for split in ("train", "val", "test"):
        photo(root / split / "0001TP_1.png")
        mask(root / f"{split}annot" / "0001TP_1.png", [0, 4, 10, 11])
    return root


BUILDERS = {
    "ade20k": build_ade20k,
    "ade20k_full": build_ade20k_full,
    "camvid": build_camvid,
    "cityscapes": build_cityscapes,
    "cocostuff164k": build_cocostuff,
    "context": build_context,
    "voc2012": build_voc,
}


@pytest.mark.parametrize(
    ("name", "options", "classes", "unseen", "rows"),
    [
        ("voc2012", {}, 20, 5, [255, 0, 19, 255]),
        ("cocostuff164k", {}, 171, 15, [0, 11, 170, 255]),
        ("context", {}, 59, 10, [255, 0, 58, 255]),
        ("context", {"background": True}, 60, 10, [0, 1, 59, 255]),
        ("ade20k", {}, 150, 0, [255, 0, 149]),
        ("ade20k_full", {}, 847, 275, [0, 846, 65535]),
        ("cityscapes", {}, 19, 0, [255, 0, 18, 255, 16]),
        ("camvid", {}, 11, 0, [0, 4, 10, 255]),
    ],
)
def test_reads_the_published_layout(tmp_path, name, options, classes, unseen, rows):
    BUILDERS[name](tmp_path)
    dataset = create_dataset(name, tmp_path, "train", partial=True, **options)
    assert isinstance(dataset, SegmentationDataset)
    assert len(dataset.class_names) == classes
    assert len(dataset.seen) == classes - unseen
    assert rows_of(dataset)[: len(rows)] == rows
    assert dataset[0].labels.dtype == (np.uint16 if classes > 254 else np.uint8)
    assert dataset.ignore_label == (65535 if classes > 254 else 255)
    assert dataset.palette is None or dataset.palette.shape == (classes, 3)
    assert len(create_dataset(name, tmp_path, "val", partial=True, **options)) >= 1


@pytest.mark.parametrize("name", BUILDERS)
def test_the_root_itself_and_the_folder_above_it_both_do(tmp_path, name):
    base = BUILDERS[name](tmp_path)
    assert len(create_dataset(name, str(base), "train", partial=True)) >= 1


@pytest.mark.parametrize("name", BUILDERS)
def test_a_missing_root_says_what_to_download(tmp_path, name):
    with pytest.raises(DatasetError, match=r"root: expected .* got no such folder\. Download .*"):
        create_dataset(name, tmp_path / "nothing", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"got no folder \w+/ in it\. Download .*root holds"):
        create_dataset(name, tmp_path / "empty", "train")


@pytest.mark.parametrize("name", BUILDERS)
def test_half_a_download_is_refused(tmp_path, name):
    BUILDERS[name](tmp_path)
    with pytest.raises(DatasetError, match=r"expected \d+ pictures .*partial=True.*Download"):
        create_dataset(name, tmp_path, "val")


def test_voc_train_takes_each_lists_masks(tmp_path):
    build_voc(tmp_path)
    train = create_dataset("voc2012", tmp_path, "train", partial=True)
    assert [pair.name for pair in train.pairs] == ["2007_1", "2008_3"]
    assert rows_of(train, 0)[:4] == [255, 0, 19, 255]
    assert rows_of(train, 1)[:2] == [15, 255]
    everything_aug = create_dataset("voc2012", tmp_path, "trainaug", partial=True)
    assert rows_of(everything_aug, 0)[:2] == [255, 1]


def test_conventions_differ_in_names_and_order(tmp_path):
    build_voc(tmp_path / "voc")
    names = [
        create_dataset("voc2012", tmp_path / "voc", "val", partial=True, convention=c).class_names
        for c in ("zegclip", "zegformer")
    ]
    assert (names[0][15], names[1][15]) == ("pottedplant", "potted plant")
    assert names[0][:15] == names[1][:15]

    build_cocostuff(tmp_path / "coco", values=[20, 0])
    options = {"partial": True, "convention": "zegformer"}
    dataset = create_dataset("cocostuff164k", tmp_path / "coco", "val", **options)
    assert dataset.seen == tuple(range(156))
    assert dataset.class_names[156] == "cow"
    with pytest.raises(ArgumentError, match="convention: expected one of zegclip, zegformer"):
        create_dataset("cocostuff164k", tmp_path / "coco", "val", partial=True, convention="x")


@pytest.mark.parametrize("convention", ["zegclip", "zegformer"])
def test_cocostuff_as_published_equals_the_converted_one(tmp_path, convention):
    build_cocostuff(tmp_path / "raw", converted=False)
    build_cocostuff(tmp_path / "converted")
    raw, converted = (
        create_dataset("cocostuff164k", tmp_path / kind, partial=True, convention=convention)
        for kind in ("raw", "converted")
    )
    assert rows_of(raw) == rows_of(converted)


def test_a_value_of_no_class_is_named(tmp_path):
    build_cocostuff(tmp_path, converted=False, values=[0, 11, 25, 254])
    dataset = create_dataset("cocostuff164k", tmp_path, partial=True)
    with pytest.raises(DatasetError) as caught:
        dataset[0]
    assert "000000000009.png: expected values" in str(caught.value)
    assert "got 11, 25, 254." in str(caught.value)


def test_a_listed_picture_or_mask_that_is_missing_is_named(tmp_path):
    base = build_voc(tmp_path)
    (base / "SegmentationClassAug" / "2008_3.png").unlink()
    with pytest.raises(DatasetError, match=r"SegmentationClassAug: expected the 1 masks that aug"):
        create_dataset("voc2012", tmp_path, partial=True)
    (base / "JPEGImages" / "2007_1.jpg").unlink()
    with pytest.raises(DatasetError, match=r"JPEGImages: .* got all but 2007_1\.jpg\. Download"):
        create_dataset("voc2012", tmp_path, partial=True)
    photo(base / "JPEGImages" / "2007_1.jpg")
    (base / "ImageSets" / "Segmentation" / "aug.txt").unlink()
    with pytest.raises(DatasetError, match=r"aug\.txt: expected this part .*SBD"):
        create_dataset("voc2012", tmp_path, partial=True)


def test_a_picture_without_mask_and_a_mask_without_picture_are_named(tmp_path):
    base = build_ade20k(tmp_path)
    photo(base / "images" / "training" / "ADE_train_2.jpg")
    with pytest.raises(
        DatasetError, match=r"a mask \(\*\.png\) for every picture, got none for ADE_train_2"
    ):
        create_dataset("ade20k", tmp_path, partial=True)
    (base / "images" / "training" / "ADE_train_2.jpg").unlink()
    mask(base / "annotations" / "training" / "ADE_train_3.png", [1])
    with pytest.raises(DatasetError, match=r"a picture for every mask, got none for ADE_train_3"):
        create_dataset("ade20k", tmp_path, partial=True)


def test_an_unseen_class_the_data_lacks_is_named(tmp_path):
    build_camvid(tmp_path)
    dataset = create_dataset("camvid", tmp_path, partial=True, unseen=["tree", "sidewalk"])
    assert [dataset.class_names[i] for i in dataset.table.unseen] == ["pavement, sidewalk", "tree"]
    with pytest.raises(DatasetError, match=r"unseen: expected classes .* got 'zebra'\. It has"):
        create_dataset("camvid", tmp_path, partial=True, unseen=["zebra"])
    with pytest.raises(DatasetError, match="at least one class to stay seen"):
        create_dataset("camvid", tmp_path, partial=True, unseen=class_table("camvid").names)


def test_wrong_arguments_are_named(tmp_path):
    build_camvid(tmp_path)
    with pytest.raises(ArgumentError, match="name: expected one of ade20k"):
        create_dataset("imagenet", tmp_path)
    with pytest.raises(ArgumentError, match="split: expected one of train, val, test, got 'all'"):
        create_dataset("camvid", tmp_path, "all")
    with pytest.raises(ArgumentError, match="options of camvid: expected one of unseen, partial"):
        create_dataset("camvid", tmp_path, background=True)
    with pytest.raises(ArgumentError, match="root: expected the folder of camvid"):
        create_dataset("camvid")
    with pytest.raises(ArgumentError, match="root: expected none for scenes"):
        create_dataset("scenes", tmp_path)
    assert set(DATASETS) == {*BUILDERS, "folder", "photos", "scenes"}


def test_missing_index_ends_iteration(tmp_path):
    build_camvid(tmp_path)
    dataset = create_dataset("camvid", tmp_path, partial=True)
    with pytest.raises(IndexError):
        dataset[1]
