"""The way to the shipped bundle, with a CLIP and a training of the least size."""

import json

import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
pytest.importorskip("accelerate", reason="needs pip install '.[train]'")

from safetensors.torch import save_file  # noqa: E402

from zsseg_rt import Bundle  # noqa: E402
from zsseg_rt.demo import BUNDLE, CLASSES, PHOTOS  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError  # noqa: E402
from zsseg_rt.evaluation.datasets.scenes import CLASS_NAMES, SEEN, words_of_world  # noqa: E402
from zsseg_rt.experiments.clip_pretraining import pretrain  # noqa: E402
from zsseg_rt.experiments.make_demo import DemoConfig, train_demo, write_demo  # noqa: E402
from zsseg_rt.experiments.small_clip import PretrainingConfig  # noqa: E402

TOWERS = {"width": 64, "num_layers": 2, "text_width": 64, "text_layers": 1, "embed_dim": 64}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    config = PretrainingConfig(steps=2, batch_size=4, warmup_steps=1, view_size=32, **TOWERS)
    return pretrain(config, tmp_path_factory.mktemp("clip"), num_workers=0)


def test_a_bundle_comes_out_with_its_words_and_history(clip, tmp_path):
    config = DemoConfig(iterations=2, batch_size=2, warmup_steps=1, num_prompts=2, num_scenes=4)
    model = train_demo(clip, config, tmp_path / "run")
    assert not any(p.requires_grad for p in model.text_encoder.parameters())
    path = write_demo(model, clip, config, tmp_path, commit="abc")
    assert path == tmp_path / BUNDLE
    bundle = Bundle.load(path)
    bundle.verify()
    assert bundle.text.words == words_of_world()
    assert bundle.head.seen == tuple(CLASS_NAMES[index] for index in SEEN)
    source = json.loads(bundle.provenance["source"])
    assert source["commit"] == "abc"
    assert source["zegclip"]["iterations"] == 2
    assert source["clip"]["config"]["width"] == 64
    assert (tmp_path / CLASSES).read_text().splitlines() == list(CLASS_NAMES)
    assert all((tmp_path / photo).is_file() for photo in PHOTOS)


def test_wrong_beginnings_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="got a file without its metadata"):
        train_demo(tmp_path / "foreign.safetensors", DemoConfig(), tmp_path / "run")
    with pytest.raises(ArgumentError, match="size: expected a multiple of the patch size 16"):
        DemoConfig(size=100)
