"""A user's own folder, and what is said about damaged or ill-fitting files."""

import numpy as np
import pytest
from PIL import Image

from support.dataset_trees import listing, mask, photo, rows_of
from support.errors import refused
from support.picture_files import BOMBS
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets import SegmentationDataset, create_dataset
from zsseg_rt.evaluation.datasets.files import read_colour_mask, read_mask, read_picture


@pytest.fixture
def street(tmp_path):
    """Two pictures, three classes of which one is unseen."""
    listing(tmp_path / "classes.txt", ["road, street", "tree [unseen]", "  car  ", ""])
    for name, values in (("a", [0, 1, 2, 255]), ("b", [2, 2])):
        photo(tmp_path / "images" / f"{name}.jpg")
        mask(tmp_path / "masks" / f"{name}.png", values)
    return tmp_path


def test_reads_a_folder(street):
    dataset = create_dataset("folder", street, "all")
    assert dataset.class_names == ("road, street", "tree", "car")
    assert dataset.seen == (0, 2)
    assert [dataset[i].name for i in range(len(dataset))] == ["a", "b"]
    assert rows_of(dataset)[:4] == [0, 1, 2, 255]


def test_photos_need_neither_masks_nor_classes(street):
    photos = create_dataset("photos", street, "images")
    assert isinstance(photos, SegmentationDataset)
    assert [photos[i].name for i in range(len(photos))] == ["a.jpg", "b.jpg"]
    assert (photos.class_names, photos.seen) == ((), ())
    np.testing.assert_array_equal(photos[0].image, read_picture(street / "images/a.jpg"))
    assert set(rows_of(photos)) == {photos.ignore_label}
    every = create_dataset("photos", street, "all")
    assert [every[i].name for i in (0, 2)] == ["images/a.jpg", "masks/a.png"]
    (street / "empty").mkdir()
    with refused(DatasetError, None, "empty"):
        create_dataset("photos", street, "empty")
    with refused(DatasetError, None, "train"):
        create_dataset("photos", street, "train")


def test_splits_are_folders_or_lists(street):
    for split, name in (("train", "a"), ("val", "b")):
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            (street / kind / split).mkdir()
            (street / kind / f"{name}.{suffix}").rename(street / kind / split / f"{name}.{suffix}")
    assert [pair.name for pair in create_dataset("folder", street, "val").pairs] == ["b"]
    every = create_dataset("folder", street, "all")
    assert [pair.name for pair in every.pairs] == ["train/a", "val/b"]
    listing(street / "few.txt", ["val/b.jpg", "train/a"])
    few = create_dataset("folder", street, "few")
    assert [pair.name for pair in few.pairs] == ["val/b", "train/a"]
    with refused(DatasetError, "split", "'all'"):
        create_dataset("folder", street, "test")
    listing(street / "few.txt", ["val/c"])
    with refused(DatasetError, None, "few.txt", "'val/c'"):
        create_dataset("folder", street, "few")


def test_colour_masks(street):
    listing(street / "colours.txt", ["0 0 0 void", "128 64 128 road, street", "0 128 0\ttree"])
    for name in ("a", "b"):
        colours = np.zeros((12, 16, 3), np.uint8)
        colours[:6], colours[6:9] = (128, 64, 128), (0, 128, 0)
        Image.fromarray(colours).save(street / "masks" / f"{name}.png")
    names = ["road, street", "tree"]
    dataset = create_dataset("folder", street, "all", class_names=names)
    assert rows_of(dataset) == [0] * 6 + [1] * 3 + [255] * 3
    with refused(DatasetError, None, "colours.txt"):
        create_dataset("folder", street, "all")
    colours[11, 3] = (1, 2, 3)
    Image.fromarray(colours).save(street / "masks" / "b.png")
    with refused(DatasetError, None, "b.png", "colours.txt"):
        dataset[1]
    listing(street / "colours.txt", ["256 0 0 void"])
    with refused(DatasetError, None, "0..255"):
        create_dataset("folder", street, "all")


def without(*parts):
    """Remove what a folder consists of."""

    def spoil(root):
        for part in parts:
            for path in root.glob(part):
                path.unlink()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (["road", "road"], "expected different names, got 'road' twice"),
        (["road", "[unseen]"], "expected different names, got an empty one"),
        (["road [unseen]"], "at least one seen class"),
        (lambda root: (root / "classes.txt").write_bytes(b"road\n\xff\xfe\n"), r"classes\.txt"),
        (without("classes.txt"), r"classes\.txt"),
        (without("images/*", "masks/*"), r"\b0\b"),
        (lambda root: photo(root / "images/a.png"), "images"),
        (
            lambda root: (root / "masks/a.png").rename(root / "masks/a.jpg"),
            r"one mask \(\*\.png, .*\) for every image, got none for a\. Put your own photos",
        ),
    ],
)
def test_folders_that_are_not_whole_are_refused(street, spoil, message):
    if isinstance(spoil, list):
        listing(street / "classes.txt", spoil)
    else:
        spoil(street)
    with pytest.raises(DatasetError, match=message):
        create_dataset("folder", street, "all")


# --- files ---


@pytest.mark.parametrize("read", [read_picture, read_mask])
def test_a_file_that_is_not_there_is_refused(tmp_path, read):
    with refused(DatasetError, None, "a.png"):
        read(tmp_path / "a.png")


def test_a_colour_picture_is_no_mask(tmp_path):
    photo(tmp_path / "a.png")
    with refused(DatasetError, None, "RGB"):
        read_mask(tmp_path / "a.png")


def test_ids_of_a_list_are_the_values_of_masks(tmp_path):
    """Numbers in front, names of no class and CVAT's colours; an empty line is refused."""
    photo(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", [1, 2, 4, 255])
    listing(tmp_path / "classes.txt", ["1: car", "2: void", "4: road"])
    assert rows_of(create_dataset("folder", tmp_path, "all"))[:4] == [0, 255, 1, 255]
    listing(tmp_path / "classes.txt", ["void", "car", "_background_", "road"])
    data = create_dataset("folder", tmp_path, "all", zero_is_unlabelled=True)
    assert rows_of(data)[:4] == [255, 0, 1, 255]
    listing(tmp_path / "classes.txt", ["car", "", "road"])
    with refused(DatasetError, None, "line", "2"):
        create_dataset("folder", tmp_path, "all")
    colours = {0: (0, 0, 0), 1: (255, 0, 0), 2: (128, 64, 128)}
    values = read_mask(tmp_path / "masks/a.png") % 4 % 3  # 1, 2, 0, 0
    rgb = np.array([colours[value] for value in range(3)], np.uint8)[values]
    Image.fromarray(rgb).save(tmp_path / "masks/a.png")
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "car:255,0,0::"]
    listing(tmp_path / "classes.txt", [*lines, "road:128,64,128::"])
    assert rows_of(create_dataset("folder", tmp_path, "all"))[:4] == [0, 1, 255, 255]


@pytest.mark.parametrize("top", [255, 65535])
def test_masks_of_nothing_but_0_and_255_are_remarked_upon(top, tmp_path, caplog):
    listing(tmp_path / "classes.txt", ["floor", "box"])
    photo(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", [0, top])
    assert rows_of(create_dataset("folder", tmp_path, "all"))[:2] == [0, 255]
    assert f"values=[0,{top}]" in caplog.text
    caplog.clear()
    assert rows_of(create_dataset("folder", tmp_path, "all", values=[0, top]))[:2] == [0, 1]
    listing(tmp_path / "classes.txt", ["0 floor", f"{top} box"])
    assert rows_of(create_dataset("folder", tmp_path, "all"))[:2] == [0, 1]
    assert not caplog.text


def test_masks_whose_values_are_no_ids(tmp_path):
    """Refused with the options that mend them, or read where they are plain."""
    listing(tmp_path / "classes.txt", ["floor", "box", "ball"])
    photo(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", [0, 128, 255])
    with refused(DatasetError, None, "128", "values", "zero_is_unlabelled"):
        create_dataset("folder", tmp_path, "all")[0]
    grey = create_dataset("folder", tmp_path, "all", values=[0, 128, 255])
    assert rows_of(grey)[:3] == [0, 1, 2]
    for wrong in ([0, 1], [0, 1, 1], [0, 1, 70000]):
        with refused(DatasetError, "values"):
            create_dataset("folder", tmp_path, "all", values=wrong)
    stored = Image.open(tmp_path / "masks/a.png").copy()
    for mode in ("RGB", "RGBA", "LA"):
        stored.convert(mode).save(tmp_path / "masks/a.png")
        assert rows_of(grey)[:3] == [0, 1, 2]
    stored.convert("1", dither=0).save(tmp_path / "masks/a.png")
    assert set(np.unique(read_mask(tmp_path / "masks/a.png"))) == {0, 1}


def test_names_match_composed_or_not_and_tiffs_count(tmp_path):
    listing(tmp_path / "classes.txt", ["road"])
    photo(tmp_path / "images/cafe\u0301.jpg")
    mask(tmp_path / "masks/caf\u00e9.png", [0])
    photo(tmp_path / "images/b.TIF")
    mask(tmp_path / "masks/b.tif", [0])
    photo(tmp_path / "images/c.jpg")
    (tmp_path / "images/c.jpg").rename(tmp_path / "images/c.jfif")
    mask(tmp_path / "masks/c.png", [0])
    listing(tmp_path / "val.txt", ["caf\u00e9.jpg", "b", "c.jfif"])
    for split in ("all", "val"):
        data = create_dataset("folder", tmp_path, split)
        assert {data[i].name for i in range(3)} == {"caf\u00e9", "b", "c"}


# --- files that claim too much: one kind of error ---


@pytest.mark.parametrize("read", [read_picture, read_mask, read_colour_mask])
@pytest.mark.parametrize("name", ["67 bytes", "no width", "gif"])
def test_bombs_are_refused_by_their_header(name, read, tmp_path):
    data, message = BOMBS[name]
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"a\.png: .*{message}"):
        read(path)


def test_a_mask_between_the_two_limits_is_refused(tmp_path):
    """Pillow has a limit of its own, below ours."""
    path, side = tmp_path / "a.webp", 13799
    Image.new("RGB", (30, 20)).save(path, lossless=True)
    data = bytearray(path.read_bytes())
    data[21:25] = (side | side << 14).to_bytes(4, "little")
    path.write_bytes(data)
    with refused(DatasetError, None, path.name):
        read_colour_mask(path)
