"""Data that training could not learn from is found before, or ends the run by its name."""

import json

import pytest

pytest.importorskip("accelerate")

from support.command_line import run
from support.dataset_trees import build_voc, listing, mask, photo
from support.small_runs import settings
from zsseg_rt.errors import DatasetError
from zsseg_rt.training.assembly import assemble, train
from zsseg_rt.training.data_checks import LEAST_BATCHES, check_data
from zsseg_rt.training.loop.checkpointing import read_checkpoint

SIZE = (64, 64)


@pytest.fixture
def street(tmp_path):
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


@pytest.fixture
def check(street, train_with):
    return lambda *arguments, config=None: train_with(
        config or settings(street), "--check-data", *arguments
    )


def test_sound_data_is_described(check, tmp_path):
    code, out, err = check("--json", tmp_path / "found.json")
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


def test_damaged_files_are_listed(check, street):
    mask(street / "masks" / "a.png", [0, 7], SIZE)
    mask(street / "masks" / "b.png", [2], (64, 63))
    whole = (street / "images" / "c.png").read_bytes()
    (street / "images" / "c.png").write_bytes(whole[: len(whole) // 2])
    code, out, err = check()
    assert code == 1
    assert "a.png: expected values 0..2 for the 3 classes" in out
    assert "b.png: expected the 64x64 pixels of b.png, got 63x64" in out
    assert "c.png: expected at least" in out
    assert "unusable images in street/train: 2" in err
    assert "unusable images in street/val: 1" in err


@pytest.mark.parametrize(
    ("protocol", "lacking"), [("inductive", "boat"), ("supervised", "tree, boat")]
)
def test_a_trained_class_that_no_mask_holds_is_an_error(check, street, protocol, lacking):
    listing(street / "classes.txt", ["road", "tree [unseen]", "car", "boat"])
    mask(street / "masks" / "a.png", [0, 2], SIZE)
    code, out, err = check(config=settings(street, task={"protocol": protocol}))
    assert code == 1
    assert "in no mask: tree, boat" in out
    assert f"got no pixel in street/train of {lacking}. Fix" in err


def test_what_learns_from_no_masks_needs_none(street):
    options = {"data": {"name": "photos", "split": "images"}, "evaluation": {"split": ""}}
    (report,) = check_data(settings(street, model={"architecture": "zeroseg"}, **options))
    assert (report.scan.num_pictures, report.faults) == (3, ())
    (report,) = check_data(
        settings(street, model={"architecture": "zeroseg"}, evaluation={"split": ""})
    )
    assert (report.scan.absent, report.faults) == ((), ())


# --- sets that are only partly there, and names that are not plain ---


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


def of_voc(root, clip_file, **options):
    loop = {"iterations": 2, "batch_size": 2, "num_workers": 1}
    data = {"name": "voc2012", "options": options}
    return settings(root, clip_file, data=data, loop=loop, output={"folder": str(root / "run")})


@pytest.mark.parametrize(
    ("gone", "arguments"),
    [
        ("", ["--check-data"]),
        ("JPEGImages/2008_3.jpg", ["--check-data"]),
        ("SegmentationClassAug", ["--dry-run"]),
        ("ImageSets/Segmentation/val.txt", []),
    ],
)
def test_what_is_missing_is_named_before_training(train_with, tmp_path, clip_file, gone, arguments):
    voc = build_voc(tmp_path)
    if not gone:  # a tree of three images: fewer than were published
        code, _, err = train_with(of_voc(voc, clip_file), *arguments)
        assert "expected 10582 images" in err
        assert "got 2" in err
    else:
        (voc / gone).rename(tmp_path / "elsewhere")
        code, _, err = train_with(of_voc(voc, clip_file, partial=True), *arguments)
        assert gone.rpartition("/")[2].partition(".")[0] in err
        assert "VOC" in err
        assert "http" in err  # where to get it
    assert code == 1
    assert not (voc / "run").exists()


def test_training_ends_where_nothing_can_be_learned(street, clip_file):
    for name in ("a", "b"):
        mask(street / "masks" / f"{name}.png", [1, 255], SIZE)  # unseen or not annotated
    config = settings(street, clip_file, loop={"checkpoint_interval": 20})
    wanted = (
        rf"street/train: expected annotated pixels of seen classes, got none in the first "
        rf"{LEAST_BATCHES} batches\. .*--check-data"
    )
    with pytest.raises(DatasetError, match=wanted):
        train(config)
    assert (street.parent / "run/checkpoints/step-00000040.pt").is_file()


def first_batches(config, count):
    parts = assemble(config)
    stream = parts.batches(start_position=0, process_index=0, num_processes=1, batch_size=1)
    return [next(stream) for _ in range(count)]


def test_one_useful_batch_is_enough_and_large_sets_get_more_patience(street, clip_file):
    mask(street / "masks" / "a.png", [1, 255], SIZE)
    batches = first_batches(settings(street, clip_file), LEAST_BATCHES + 10)
    assert {batch.names[0] for batch in batches} == {"a", "b"}
    mask(street / "masks" / "b.png", [1, 255], SIZE)
    transductive = settings(street, clip_file, task={"protocol": "transductive"})
    assert len(first_batches(transductive, LEAST_BATCHES + 1)) == LEAST_BATCHES + 1
    names = [f"x{index:02d}" for index in range(LEAST_BATCHES)]
    for name in names:
        photo(street / "images" / f"{name}.png", SIZE)
        mask(street / "masks" / f"{name}.png", [1], SIZE)
    listing(street / "train.txt", names)
    with pytest.raises(DatasetError, match=f"in the first {3 * LEAST_BATCHES} batches"):
        first_batches(settings(street, clip_file), 4 * LEAST_BATCHES)
