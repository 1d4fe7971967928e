"""Training and its check on names that are not plain, and on sets that are only partly there."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from support.command_line import run  # noqa: E402
from support.dataset_trees import build_voc, listing, mask, photo  # noqa: E402
from support.small_runs import save_clip, settings  # noqa: E402
from zsseg_rt.training.loop.checkpointing import read_checkpoint  # noqa: E402

SIZE = (64, 64)
PARTIAL = {"partial": True}


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("a clip") / "tiny klein.safetensors")


@pytest.fixture
def command(tmp_path, capsys):
    """Run ``train`` with a configuration; its exit code, output and errors."""

    def call(config, *arguments):
        path = tmp_path / "run.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        code = run("train", "--config", path, *arguments)
        return code, *capsys.readouterr()

    return call


def test_names_with_spaces_and_of_any_script_train(command, clip_file, tmp_path):
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
    code, out, err = command(config, "--check-data")
    assert (code, err) == (0, "")
    assert "木" in out
    code, _, err = command(config, "--json", tmp_path / "ergebnis 1.json")
    assert code == 0, err
    assert json.loads((tmp_path / "ergebnis 1.json").read_text(encoding="utf-8"))["step"] == 2
    card = read_checkpoint(folder / "checkpoints/step-00000002.pt").model_card
    assert card["classes"]["names"] == ["Straße, rua", "木", "car"]
    assert "Fotos São Paulo" in (folder / "config.toml").read_text(encoding="utf-8")


# --- VOC, made on the spot ---


@pytest.fixture
def voc(tmp_path):
    return build_voc(tmp_path)


def of_voc(root, clip_file, options=PARTIAL):
    data = {"name": "voc2012", "options": options}
    loop = {"iterations": 2, "batch_size": 2, "num_workers": 1}
    return settings(root, clip_file, data=data, loop=loop, output={"folder": str(root / "run")})


def test_a_set_of_fewer_pictures_than_published_is_refused(command, voc, clip_file):
    for arguments in (["--check-data"], ["--dry-run"], []):
        code, _, err = command(of_voc(voc, clip_file, options={}), *arguments)
        assert code == 1
        assert "expected 10582 images" in err
        assert "got 2" in err
    assert not (voc / "run").exists()


@pytest.mark.parametrize("arguments", [["--check-data"], ["--dry-run"], []])
@pytest.mark.parametrize(
    "gone",
    [
        "JPEGImages/2008_3.jpg",
        "SegmentationClassAug/2008_3.png",
        "SegmentationClassAug",
        "ImageSets/Segmentation/aug.txt",
        "ImageSets/Segmentation/val.txt",
    ],
)
def test_what_is_missing_is_named_before_training(command, voc, clip_file, gone, arguments):
    if (voc / gone).is_dir():
        (voc / gone).rename(voc / "elsewhere")
    else:
        (voc / gone).unlink()
    code, _, err = command(of_voc(voc, clip_file), *arguments)
    assert code == 1
    name = gone.rpartition("/")[2]
    assert name.partition(".")[0] in err
    assert "VOC" in err
    assert "http" in err  # where to get it
    assert not (voc / "run").exists()


def test_a_cut_off_photo_is_named(command, voc, clip_file):
    photo(voc / "JPEGImages" / "2008_3.jpg", SIZE)
    mask(voc / "SegmentationClassAug" / "2008_3.png", [16, 0], SIZE)
    path = voc / "JPEGImages" / "2008_3.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    code, out, err = command(of_voc(voc, clip_file), "--check-data")
    assert code == 1
    assert "2008_3.jpg: expected at least" in out
    assert "unusable images in voc2012/train: 1" in err
    code, _, err = command(of_voc(voc, clip_file))
    assert code == 1
    assert "2008_3.jpg: expected at least" in err


def test_an_empty_list_is_named(command, voc, clip_file):
    listing(voc / "ImageSets" / "Segmentation" / "val.txt", [])
    code, _, err = command(of_voc(voc, clip_file), "--check-data")
    assert code == 1
    assert "voc" in err.lower()
    assert "got 0" in err
