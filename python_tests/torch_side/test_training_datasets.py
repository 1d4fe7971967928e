"""Published layouts and a user's own folder: read, checked before training, or refused by name."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("accelerate")

from support.command_line import run
from support.errors import refused
from support.picture_files import BOMBS
from support.small_runs import (
    BUILDERS,
    build_cocostuff,
    build_voc,
    listing,
    mask,
    photo,
    rows_of,
    settings,
)
from zsseg_rt.errors import ArgumentError, DatasetError
from zsseg_rt.evaluation.datasets import DATASETS, SegmentationDataset, create_dataset
from zsseg_rt.evaluation.datasets.files import read_colour_mask, read_mask, read_picture
from zsseg_rt.evaluation.datasets.published import class_table, published_classes
from zsseg_rt.training.assembly import assemble, train
from zsseg_rt.training.data_checks import LEAST_BATCHES, check_data
from zsseg_rt.training.loop.checkpointing import read_checkpoint


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
        ("voc20", {}, 20, 0, [255, 0, 19, 255]),
        ("voc21", {}, 21, 0, [0, 1, 20, 255]),
        ("context59", {}, 59, 0, [255, 0, 58, 255]),
        ("context60", {}, 60, 0, [0, 1, 59, 255]),
        ("coco-stuff", {}, 171, 0, [0, 11, 170, 255]),
        ("coco-object", {}, 81, 0, [1, 12, 0, 0]),  # stuff and what is not annotated: background
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
    assert len(create_dataset(name, tmp_path, "val", partial=True, **options)) >= 1


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_missing_is_refused_with_what_to_download(tmp_path, name):
    for root in (tmp_path / "nothing", tmp_path):
        with refused(DatasetError, "root"):
            create_dataset(name, root, "train")
    BUILDERS[name](tmp_path)
    with pytest.raises(DatasetError, match=r"expected \d+ images .*partial=True.*Download"):
        create_dataset(name, tmp_path, "val")


def test_voc_train_takes_each_lists_masks_and_conventions_differ_in_names(tmp_path):
    build_voc(tmp_path)
    train = create_dataset("voc2012", tmp_path, "train", partial=True)
    assert [pair.name for pair in train.pairs] == ["2007_1", "2008_3"]
    assert rows_of(train, 0)[:4] == [255, 0, 19, 255]
    assert rows_of(train, 1)[:2] == [15, 255]
    everything_aug = create_dataset("voc2012", tmp_path, "trainaug", partial=True)
    assert rows_of(everything_aug, 0)[:2] == [255, 1]
    names = [
        create_dataset("voc2012", tmp_path, "val", partial=True, convention=c).class_names
        for c in ("zegclip", "zegformer")
    ]
    assert (names[0][15], names[1][15]) == ("pottedplant", "potted plant")
    assert names[0][:15] == names[1][:15]


def test_conventions_differ_in_order(tmp_path):
    build_cocostuff(tmp_path / "coco", values=[20, 0])
    options = {"partial": True, "convention": "zegformer"}
    dataset = create_dataset("cocostuff164k", tmp_path / "coco", "val", **options)
    assert dataset.seen == tuple(range(156))
    assert dataset.class_names[156] == "cow"
    with refused(ArgumentError, None, "convention", "zegclip", "zegformer"):
        create_dataset("cocostuff164k", tmp_path / "coco", "val", partial=True, convention="x")


def test_masks_as_published_equal_the_converted_ones(tmp_path):
    build_cocostuff(tmp_path / "raw", converted=False)
    build_cocostuff(tmp_path / "converted")
    for name, options in (
        ("cocostuff164k", {"convention": "zegclip"}),
        ("cocostuff164k", {"convention": "zegformer"}),
        ("coco-object", {}),
    ):
        raw, converted = (
            create_dataset(name, tmp_path / kind, partial=True, **options)
            for kind in ("raw", "converted")
        )
        assert rows_of(raw) == rows_of(converted)
    build_cocostuff(tmp_path / "raw", converted=False, values=[0, 11, 25, 254])
    with refused(DatasetError, None, "000000000009.png", "11", "25", "254"):
        create_dataset("cocostuff164k", tmp_path / "raw", partial=True)[0]


def test_wrong_arguments_are_named(tmp_path):
    BUILDERS["camvid"](tmp_path)
    dataset = create_dataset("camvid", tmp_path, partial=True, unseen=["tree", "sidewalk"])
    assert [dataset.class_names[i] for i in dataset.table.unseen] == ["pavement, sidewalk", "tree"]
    with refused(DatasetError, "unseen", "'zebra'"):
        create_dataset("camvid", tmp_path, partial=True, unseen=["zebra"])
    with refused(DatasetError, "unseen"):
        create_dataset("camvid", tmp_path, partial=True, unseen=class_table("camvid").names)
    with refused(ArgumentError, "name"):
        create_dataset("imagenet", tmp_path)
    with refused(ArgumentError, "split", "'all'"):
        create_dataset("camvid", tmp_path, "all")
    for name, option in (("camvid", "background"), ("folder", "partial"), ("photos", "unseen")):
        with refused(ArgumentError, None, f"'{option}'"):
            create_dataset(name, tmp_path, **{option: True})
    for name, value in (("unseen", "car"), ("zero_is_unlabelled", "no")):
        with refused(ArgumentError, None, name, f"'{value}'"):
            create_dataset("folder", tmp_path, **{name: value})
    with refused(ArgumentError, "root"):
        create_dataset("camvid")
    assert set(DATASETS) == {*BUILDERS, "folder", "photos"}


# --- class lists, against the reference data beside the project ---


@pytest.mark.parametrize(
    ("key", "name"),
    [("voc12_20", "voc2012"), ("cocostuff164k_171", "cocostuff164k"),
     ("pascal_context_59", "context"), ("pascal_context_60", "context")],
)  # fmt: skip
def test_published_splits(shared_dir, key, name):
    expected = json.loads((shared_dir / "specs" / "splits.json").read_text())[key]
    table = published_classes(name, background=key.endswith("60"))
    assert list(table.names) == expected["classes"]
    assert list(table.seen) == expected["seen"]
    assert list(table.unseen) == expected["unseen"]
    if name != "context":
        first = expected["reduce_zero_label"]
        assert list(table.values) == [i + first for i in range(len(table.names))]


def test_published_orders(shared_dir):
    ordered = published_classes("cocostuff164k", convention="zegformer")
    for file, table, count in (
        ("ade20k_full_847", class_table("ade20k_full"), 847),
        ("cocostuff_171_zegformer_order", ordered, 171),
    ):
        expected = json.loads((shared_dir / "specs" / f"{file}.json").read_text())
        assert list(table.names) == [entry["name"] for entry in expected]
        assert list(table.map_values) == [entry["id"] for entry in expected]
        seen = [e["seen"] if "seen" in e else e["image_count"] > 10 for e in expected]
        assert list(table.seen) == np.flatnonzero(seen).tolist()
        places = list(table.values) if file.startswith("ade") else list(range(count))
        assert [entry["trainId"] for entry in expected] == places


def test_real_data_is_read_whole(shared_dir):
    names = json.loads((shared_dir / "data" / "camvid" / "classes.json").read_text())
    dataset = create_dataset("camvid", shared_dir / "data" / "camvid", "val")
    for ours, theirs in zip(dataset.class_names, names[:11], strict=True):
        assert set(ours.split(", ")) == set(theirs.rstrip(")").split(" (")) or ours == theirs
    report = dataset.verify()
    assert (report.num_pictures, report.problems, report.absent) == (101, (), ())


@pytest.fixture
def street(tmp_path):
    """Two images, three classes of which one is unseen."""
    listing(tmp_path / "classes.txt", ["road, street", "tree [unseen]", "  car  ", ""])
    for name, values in (("a", [0, 1, 2, 255]), ("b", [2, 2])):
        photo(tmp_path / "images" / f"{name}.jpg")
        mask(tmp_path / "masks" / f"{name}.png", values)
    return tmp_path


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
    assert (every.class_names, every.seen) == (("road, street", "tree", "car"), (0, 2))
    assert [every[i].name for i in range(len(every))] == ["train/a", "val/b"]
    assert rows_of(every)[:4] == [0, 1, 2, 255]
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (["road", "road"], "expected different names, got 'road' twice"),
        (["road", "[unseen]"], "expected different names, got an empty one"),
        (["road [unseen]"], "at least one seen class"),
        (lambda root: (root / "classes.txt").write_bytes(b"road\n\xff\xfe\n"), r"classes\.txt"),
        (lambda root: (root / "classes.txt").unlink(), r"classes\.txt"),
        (lambda root: [path.unlink() for path in root.glob("*/*")], r"\b0\b"),
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


def test_ids_of_a_list_are_the_values_of_masks(tmp_path):
    """Numbers in front, names of no class and CVAT's colours."""
    photo(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", [1, 2, 4, 255])
    listing(tmp_path / "classes.txt", ["1: car", "2: void", "4: road"])
    assert rows_of(create_dataset("folder", tmp_path, "all"))[:4] == [0, 255, 1, 255]
    listing(tmp_path / "classes.txt", ["void", "car", "_background_", "road"])
    data = create_dataset("folder", tmp_path, "all", zero_is_unlabelled=True)
    assert rows_of(data)[:4] == [255, 0, 1, 255]
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


@pytest.mark.parametrize("read", [read_picture, read_mask, read_colour_mask])
def test_bombs_what_is_not_there_and_colours_for_numbers_are_refused(read, tmp_path):
    path = tmp_path / "a.png"
    with refused(DatasetError, None, "a.png"):
        read(path)
    for name in ("67 bytes", "no width", "gif"):  # by their header
        data, message = BOMBS[name]
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=rf"a\.png: .*{message}"):
            read(path)
    photo(path)
    with refused(DatasetError, None, "RGB"):
        read_mask(path)


# --- data that training could not learn from is found before, or ends the run by its name ---

SIZE = (64, 64)


@pytest.fixture
def road(tmp_path):
    """A folder of two pictures for training and one for evaluation; "tree" is unseen."""
    root = tmp_path / "street"
    listing(root / "classes.txt", ["road", "tree [unseen]", "car"])
    for name, values in (("a", [0, 1, 2, 255]), ("b", [2, 2]), ("c", [0, 0, 1])):
        photo(root / "images" / f"{name}.png", SIZE)
        mask(root / "masks" / f"{name}.png", values, SIZE)
    listing(root / "train.txt", ["a", "b"])
    listing(root / "val.txt", ["c"])
    return root


@pytest.fixture
def train_with(tmp_path, capsys):
    def call(config, *arguments):
        path = tmp_path / "run.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        code = run("train", "--config", path, *arguments)
        return code, *capsys.readouterr()

    return call


def test_sound_data_is_described(road, train_with, tmp_path):
    found = ("--json", tmp_path / "found.json")
    code, out, err = train_with(settings(road), "--check-data", *found)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "training: street/train, usable images: 2" in lines
    assert "car seen 62.50" in lines
    assert "(not annotated) 12.50" in lines
    assert lines[-7] == "evaluation: street/val, usable images: 1"
    assert lines[-1] == "classes in no mask: car"
    training, evaluation = json.loads((tmp_path / "found.json").read_text())
    assert training["pixels"] == {"road": 1024, "tree": 1024, "car": 5120}
    assert (training["lacking"], evaluation["absent"]) == ([], ["car"])
    assert not (tmp_path / "run").exists()


def test_damaged_files_are_listed(road, train_with):
    mask(road / "masks" / "a.png", [0, 7], SIZE)
    mask(road / "masks" / "b.png", [2], (64, 63))
    whole = (road / "images" / "c.png").read_bytes()
    (road / "images" / "c.png").write_bytes(whole[: len(whole) // 2])
    code, out, err = train_with(settings(road), "--check-data")
    assert code == 1
    assert "a.png: expected values 0..2 for the 3 classes" in out
    assert "b.png: expected the 64x64 pixels of b.png, got 63x64" in out
    assert "c.png: expected at least" in out
    assert "unusable images in street/train: 2" in err
    assert "unusable images in street/val: 1" in err


@pytest.mark.parametrize(
    ("protocol", "lacking"), [("inductive", "boat"), ("supervised", "tree, boat")]
)
def test_a_trained_class_that_no_mask_holds_is_an_error(road, train_with, protocol, lacking):
    listing(road / "classes.txt", ["road", "tree [unseen]", "car", "boat"])
    mask(road / "masks" / "a.png", [0, 2], SIZE)
    config = settings(road, task={"protocol": protocol})
    code, out, err = train_with(config, "--check-data")
    assert code == 1
    assert "in no mask: tree, boat" in out
    assert f"got no pixel in street/train of {lacking}. Fix" in err


def test_what_learns_from_no_masks_needs_none(road):
    options = {"data": {"name": "photos", "split": "images"}, "evaluation": {"split": ""}}
    (report,) = check_data(settings(road, model={"architecture": "zeroseg"}, **options))
    assert (report.scan.num_pictures, report.faults) == (3, ())
    (report,) = check_data(
        settings(road, model={"architecture": "zeroseg"}, evaluation={"split": ""})
    )
    assert (report.scan.absent, report.faults) == ((), ())


def test_names_with_spaces_and_of_any_script_train(train_with, clip_file, tmp_path):
    root = tmp_path / "Fotos São Paulo"
    names = ["Straße 1", "東京 駅", "улица [2]", "a#b%20c"]
    for seed, name in enumerate(names):
        photo(root / "images" / f"{name}.jpg", SIZE, seed)
        mask(root / "masks" / f"{name}.png", [0, 1, 2, 255], SIZE)
    (root / "classes.txt").write_text("Straße, rua\n木 [unseen]\ncar\n", encoding="utf-8")
    (root / "train.txt").write_text("\n".join(names[:3]), encoding="utf-8")
    (root / "val.txt").write_text(names[3], encoding="utf-8")
    folder = tmp_path / "Läufe" / "erster Lauf"
    loop = {"iterations": 2, "batch_size": 3, "num_workers": 1, "log_interval": 1}
    config = settings(root, clip_file, loop=loop, output={"folder": str(folder)})
    for option, shown in (("--check-data", "木"), ("--dry-run", "iterations = 2")):
        code, out, err = train_with(config, option)
        assert (code, err) == (0, "")
        assert shown in out
    assert not folder.exists()
    code, out, err = train_with(config, "--json", tmp_path / "ergebnis 1.json")
    assert code == 0, err
    assert "finished 2 steps" in out
    assert json.loads((tmp_path / "ergebnis 1.json").read_text(encoding="utf-8"))["step"] == 2
    card = read_checkpoint(folder / "checkpoints/step-00000002.pt").model_card
    assert card["classes"]["names"] == ["Straße, rua", "木", "car"]
    assert "Fotos São Paulo" in (folder / "config.toml").read_text(encoding="utf-8")


def test_what_is_missing_is_named_before_training(train_with, tmp_path, clip_file):
    voc = build_voc(tmp_path)
    data = {"name": "voc2012", "options": {"partial": True}}
    config = settings(voc, clip_file, data=data, output={"folder": str(voc / "run")})
    for gone, *arguments in (
        ("ImageSets/Segmentation/val.txt",),
        ("SegmentationClassAug", "--dry-run"),
        ("JPEGImages/2008_3.jpg", "--check-data"),
    ):
        (voc / gone).rename(tmp_path / "elsewhere")
        code, _, err = train_with(config, *arguments)
        (tmp_path / "elsewhere").rename(voc / gone)
        assert code == 1
        assert gone.rpartition("/")[2].partition(".")[0] in err
        assert "VOC" in err
        assert "http" in err  # where to get it
        assert not (voc / "run").exists()


def test_training_ends_where_nothing_can_be_learned(road, clip_file):
    for name in ("a", "b"):
        mask(road / "masks" / f"{name}.png", [1, 255], SIZE)  # unseen or not annotated
    config = settings(road, clip_file, loop={"checkpoint_interval": 20})
    wanted = (
        rf"street/train: expected annotated pixels of seen classes, got none in the first "
        rf"{LEAST_BATCHES} batches\. .*--check-data"
    )
    with pytest.raises(DatasetError, match=wanted):
        train(config)
    assert (road.parent / "run/checkpoints/step-00000040.pt").is_file()


def first_batches(config, count):
    parts = assemble(config)
    stream = parts.batches(start_position=0, process_index=0, num_processes=1, batch_size=1)
    return [next(stream) for _ in range(count)]


def test_one_useful_batch_is_enough_and_large_sets_get_more_patience(road, clip_file):
    mask(road / "masks" / "a.png", [1, 255], SIZE)
    batches = first_batches(settings(road, clip_file), LEAST_BATCHES + 10)
    assert {batch.names[0] for batch in batches} == {"a", "b"}
    mask(road / "masks" / "b.png", [1, 255], SIZE)
    transductive = settings(road, clip_file, task={"protocol": "transductive"})
    assert len(first_batches(transductive, LEAST_BATCHES + 1)) == LEAST_BATCHES + 1
    names = [f"x{index:02d}" for index in range(LEAST_BATCHES)]
    for name in names:
        photo(road / "images" / f"{name}.png", SIZE)
        mask(road / "masks" / f"{name}.png", [1], SIZE)
    listing(road / "train.txt", names)
    with pytest.raises(DatasetError, match=f"in the first {3 * LEAST_BATCHES} batches"):
        first_batches(settings(road, clip_file), 4 * LEAST_BATCHES)
