"""What ships for the first minute works without torch, labels scenes right, knows its words."""

import json
import subprocess
import sys

import pytest

from support.errors import refused
from tools.scenes import CLASS_NAMES, SEEN, SceneDataset, words_of_world
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.cli import main
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.errors import BundleError
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.photos import read_photo

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "open_clip", "onnx", "torchvision"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import socket
socket.socket.connect = None
from zsseg_rt.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    config = EngineConfig(device="cpu", cache_dir=tmp_path_factory.mktemp("cache"))
    with Engine(demo_bundle("scenes"), config) as engine:
        yield engine


def test_demo_needs_no_arguments_no_torch_no_network(tmp_path):
    call = [sys.executable, "-c", BLOCKED, "segment", "--demo", "scenes"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for photo in demo_photos("scenes"):
        stem = photo.rsplit("/", 1)[-1].removesuffix(".png")
        overlay = read_photo(tmp_path / "zsseg_out" / f"{stem}.overlay.png")
        assert overlay.shape == read_photo(photo).shape
        assert stem in done.stdout
    assert sum(name in done.stdout for name in CLASS_NAMES) >= 4
    assert "This model was trained on" in done.stdout
    assert "checkered" in done.stdout


def test_the_default_is_the_photo_demo():
    assert Bundle.demo().path == demo_bundle() == demo_bundle("photos")
    assert demo_photos() == demo_photos("photos")
    assert demo_classes() == demo_classes("photos")


@pytest.mark.parametrize(("demo", "shown"), [([], "chair"), (["scenes"], "grey stone wall")])
def test_the_command_takes_the_demo_that_is_named(demo, shown, tmp_path, capsys):
    assert main(["segment", "--demo", *demo, "--out", str(tmp_path)]) == 0
    assert shown in capsys.readouterr().out
    names = demo_photos(*demo)
    assert len(list(tmp_path.glob("*.overlay.png"))) == len(names)


def test_the_bundle_that_ships_has_a_name_in_python():
    bundle = Bundle.demo("scenes")
    assert bundle.path == demo_bundle("scenes")
    with Engine(bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        engine.set_classes(["red thing"])
        assert engine.segment(read_photo(demo_photos("scenes")[0])).names == ("red thing",)


def test_classes_can_be_others(tmp_path, capsys):
    names = "red thing,grey wall,grey tiled floor"
    assert main(["segment", "--demo", "scenes", "--classes", names, "--out", str(tmp_path)]) == 0
    assert "grey tiled floor" in capsys.readouterr().out


def test_a_name_of_unknown_words_is_refused(tmp_path, capsys):
    code = main(
        ["segment", "--demo", "scenes", "--classes", "red ball,zebra", "--out", str(tmp_path)]
    )
    message = capsys.readouterr().err
    assert code == 1
    assert "got 'zebra'" in message
    assert all(word in message for word in words_of_world())


def test_scenes_never_seen_are_labelled_right(engine):
    dataset = SceneDataset("val", length=40)
    engine.set_classes(list(CLASS_NAMES))
    confusion = ConfusionMatrix(len(CLASS_NAMES), ignore_label=dataset.ignore_label)
    for index in range(len(dataset)):
        sample = dataset[index]
        confusion.update(sample.labels, engine.segment(sample.image).labels)
    scores = score(confusion.counts, SEEN)
    assert scores.pixel_accuracy > 0.65, scores
    assert scores.miou_seen > 0.58, scores
    assert scores.miou_unseen > 0.3, scores  # chance is about 0.01


def test_bundle_is_small_and_says_where_it_comes_from(engine):
    bundle = Bundle.load(demo_bundle("scenes"))
    bundle.verify()
    assert engine.self_check().passed
    files = [path for path in demo_bundle("scenes").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") <= 18_000_000
    assert set(bundle.graphs) == {"image_encoder", "decoder", "text_encoder"}
    assert bundle.text.words == words_of_world()
    assert bundle.licence
    source = json.loads(bundle.provenance["source"])
    assert source["world_version"] >= 1
    assert source["zegclip"]["seed"] == 0
    assert source["clip"]["config"]["seed"] == 0
    assert source["commit"]
    assert bundle.head.seen == tuple(CLASS_NAMES[index] for index in SEEN)


def test_demo_files_fit_each_other():
    assert demo_classes("scenes") == list(CLASS_NAMES)
    photos = [read_photo(photo) for photo in demo_photos("scenes")]
    assert len({photo.tobytes() for photo in photos}) == 4


def test_photos_and_bundle_are_asked_for_without_demo(tmp_path, capsys):
    assert main(["segment", "--classes", "a"]) == 2
    assert "try --demo" in capsys.readouterr().err
    assert main(["segment", demo_photos("scenes")[0], "--classes", "a"]) == 2
    assert "--bundle NAME.zsseg" in capsys.readouterr().err


def test_an_installation_without_the_files_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("zsseg_rt.demo.__file__", str(tmp_path / "__init__.py"))
    with refused(BundleError, None, "scenes.zsseg"):
        demo_bundle("scenes")
