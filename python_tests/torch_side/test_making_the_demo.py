"""The way to the shipped bundle, with a CLIP and a training of the least size."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
pytest.importorskip("accelerate", reason="needs pip install '.[train]'")

from safetensors.torch import save_file  # noqa: E402

from support.errors import refused  # noqa: E402
from tools.scenes import (  # noqa: E402
    CLASS_NAMES,
    SEEN,
    SceneDataset,
    words_of_world,
)
from tools.studies.clip_pretraining import pretrain  # noqa: E402
from tools.studies.make_demo import (  # noqa: E402
    DemoConfig,
    small_zegclip,
    train_demo,
    write_demo,
)
from tools.studies.name_draws import (  # noqa: E402
    DrawnScenes,
    evaluate_draws,
    measure_bundle,
    summarise,
)
from tools.studies.small_clip import PretrainingConfig  # noqa: E402
from zsseg_rt import Bundle  # noqa: E402
from zsseg_rt.demo import DEMOS, demo_bundle  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO = DEMOS["scenes"]
TOWERS = {"width": 64, "num_layers": 2, "text_width": 64, "text_layers": 1, "embed_dim": 64}


SMALL = {"iterations": 2, "batch_size": 2, "warmup_steps": 1, "num_prompts": 2, "num_scenes": 4}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    config = PretrainingConfig(steps=2, batch_size=4, warmup_steps=1, view_size=32, **TOWERS)
    return pretrain(config, tmp_path_factory.mktemp("clip"), num_workers=0)


@pytest.fixture(scope="module")
def exported(clip, tmp_path_factory):
    """A trained model, and the bundle that was made of it."""
    config, folder = DemoConfig(**SMALL), tmp_path_factory.mktemp("demo")
    model = train_demo(clip, config, folder / "run")
    return model, write_demo(model, clip, config, folder, commit="abc")


def test_a_bundle_comes_out_with_its_words_and_history(exported):
    model, path = exported
    assert not any(p.requires_grad for p in model.text_encoder.parameters())
    assert path.name == DEMO.bundle
    bundle = Bundle.load(path)
    bundle.verify()
    assert (bundle.preprocess.size_hw, bundle.head.grid_hw) == ((128, 128), (16, 16))
    assert bundle.text.words == words_of_world()
    assert bundle.head.seen == tuple(CLASS_NAMES[index] for index in SEEN)
    source = json.loads(bundle.provenance["source"])
    assert source["commit"] == "abc"
    assert source["zegclip"]["iterations"] == 2
    assert source["clip"]["config"]["width"] == 64
    assert bundle.head.seen_bias == 0.05
    assert (path.parent / DEMO.classes).read_text().splitlines() == list(CLASS_NAMES)
    assert all((path.parent / photo).is_file() for photo in DEMO.photos)


def test_another_start_is_in_the_recipe(clip):
    plain, expected = (
        small_zegclip(clip, DemoConfig(**SMALL, **changes)).state_dict()
        for changes in ({"start": "random", "start_offset": 0.0}, {})
    )
    moved = [name for name in plain if not torch.equal(plain[name], expected[name])]
    assert any("multihead_attn.k.bias" in name for name in moved)


def test_wrong_beginnings_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with refused(CheckpointError, None, "foreign.safetensors"):
        train_demo(tmp_path / "foreign.safetensors", DemoConfig(), tmp_path / "run")
    with refused(ArgumentError, "size", "16"):
        DemoConfig(size=100)


def test_the_shipped_clip_will_do():
    model = small_zegclip("demo", DemoConfig())
    assert (model.config.image_encoder.width, model.config.image_encoder.grid_side) == (128, 16)


class Oracle:
    """Labels scenes of a draw right, but for one unseen thing and one unseen stretch."""

    def __init__(self, data):
        self.class_names = data.class_names
        samples = [data[index] for index in range(len(data))]
        self.labels = {sample.image.tobytes(): sample.labels.copy() for sample in samples}
        for labels in self.labels.values():
            for name in (data.class_names[11], data.class_names[24]):
                labels[labels == data.class_names.index(name)] = 255

    def segment(self, image):
        return self.labels[image.tobytes()]

    def describe(self):
        return {}


def test_draws_are_measured_on_their_own_names_and_scenes():
    length = 30
    others, published = DrawnScenes(4, length=length), DrawnScenes(4, length=length, published=True)
    assert published.class_names == CLASS_NAMES != others.class_names
    assert others[0].image.tobytes() != SceneDataset("val")[0].image.tobytes()
    oracles = {data.class_names: Oracle(data) for data in (others, published)}
    (row,) = evaluate_draws(oracles.get, [4], length=length)
    assert row["unseen"] == [name for name in others.class_names if name not in CLASS_NAMES]
    for kind in ("others", "published"):
        found = row[kind]
        assert found["mIoU(S)"] == 100
        assert (found["mIoU(U) things"], found["mIoU(U) stuff"]) == (80, 75)
        assert found["mIoU(U)"] == pytest.approx(100 * 7 / 9, abs=0.01)
        assert 0 < found["unseen pixels right"] < 100
    assert row["iou_percent"][others.class_names[11]] == 0


def test_scenes_that_lack_some_classes_are_measured_and_too_few_refused():
    def opened(names):
        return Oracle(DrawnScenes(4, length=12, published=names == CLASS_NAMES))

    (row,) = evaluate_draws(opened, [4], length=12)
    assert min(row["iou_percent"].values(), key=lambda value: value is not None) is None
    assert all(np.isfinite(value) for value in row["others"].values())
    with refused(ArgumentError, "length"):
        evaluate_draws(opened, [4], length=1)


def test_a_spread_over_draws_is_that_of_a_sample():
    rows = [{"others": {"mIoU(U)": value}} for value in (30.0, 40.0, 50.0)]
    found = summarise(rows, "others")["mIoU(U)"]
    assert found == {"mean": 40.0, "sd": 10.0, "least": 30.0, "most": 50.0}


def test_the_bundle_that_ships_is_measured_with_its_record():
    found = measure_bundle(demo_bundle("scenes"), draws=[0], lists=[19, "all"], length=4, root=ROOT)
    assert all((found["bundle_sha256"], found["commit"], found["machine"]["cpu"]))
    assert found["summary"]["others"]["mIoU(U)"]["mean"] == found["draws"][0]["others"]["mIoU(U)"]
    assert [row["names"] for row in found["lists"]] == [28, 362]
    right = [row["figures"]["unseen pixels right"] for row in found["lists"]]
    assert right[0] > right[1]
