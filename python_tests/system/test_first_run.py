"""Training works on what ships with the package: no data, no download."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
pytest.importorskip("accelerate", reason="needs pip install '.[train]'")

from support.errors import refused  # noqa: E402
from support.small_runs import TABLES, save_clip  # noqa: E402
from tools.scenes import CLASS_NAMES, SceneDataset  # noqa: E402
from tools.scenes.__main__ import main as draw_scenes  # noqa: E402
from zsseg_rt import Bundle, Engine  # noqa: E402
from zsseg_rt.cli import main  # noqa: E402
from zsseg_rt.errors import CheckpointError, VocabularyError  # noqa: E402
from zsseg_rt.evaluation.evaluate import evaluate  # noqa: E402
from zsseg_rt.models import create_model  # noqa: E402
from zsseg_rt.torch_files.clip_arrays import read_shipped  # noqa: E402
from zsseg_rt.training.assembly import train  # noqa: E402
from zsseg_rt.training.class_embeddings import embed_phrases  # noqa: E402
from zsseg_rt.training.config import TrainConfig  # noqa: E402
from zsseg_rt.training.trained import TorchSegmenter, export_trained  # noqa: E402

TEMPLATES = ("a photo of a {}.",)
SHORT = ("loop.iterations=2", "loop.batch_size=2", "loop.num_workers=0", "schedule.warmup_steps=1")
SHORT += ("loop.num_pictures=0", "evaluation.limit=2", "loop.checkpoint_interval=2")


def test_one_command_trains_exports_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [part for change in SHORT for part in ("--set", change)]
    assert main(["train", "--demo"]) == 1
    assert "python -m tools.scenes scenes" in capsys.readouterr().err
    for arguments, message in ((["--demo", "--config", "demo"], "got both"), ([], "got neither")):
        assert main(["train", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert draw_scenes(["scenes", "--length", "2"]) == 0
    assert main(["train", "--demo", *settings]) == 0
    out, err = capsys.readouterr()
    run = Path("runs") / "demo"
    assert (run / "checkpoints" / "step-00000002.pt").is_file()
    assert f"bundle: {run / 'demo.zsseg'}" in out
    image = cv2.imread(str(run / "labelled.png"))
    assert image.shape == (2 * 2 * 128, 2 * 3 * 128, 3)  # two scenes, three sides, doubled
    assert "gives one class" not in err
    bundle = Bundle.load(run / "demo.zsseg")
    assert "fuzzy" in bundle.text.words
    with Engine(bundle) as engine:
        engine.set_classes(["purple fuzzy ring", "white sand"])  # not classes of the training
        labels = engine.segment(np.zeros((128, 128, 3), np.uint8)).labels
        assert set(np.unique(labels)) <= {0, 1}
        with refused(VocabularyError, "class_names"):
            engine.set_classes(["zebra"])


def test_the_clip_that_ships_knows_its_world_and_leaves_out_other_words(caplog):
    model = create_model("dense_clip", pretrained="demo", head="maskclip")
    encoder = model.text_encoder
    segmenter = TorchSegmenter(model, CLASS_NAMES, embed_phrases(encoder, CLASS_NAMES, TEMPLATES))
    scores = evaluate(segmenter, SceneDataset("val", length=6)).scores
    assert scores.pixel_accuracy > 0.25  # 0.44 on 200 scenes; guessing 28 classes has 0.04
    with refused(VocabularyError, "class_names"):
        embed_phrases(encoder, ["a zebra"], TEMPLATES)
    both = embed_phrases(encoder, ["red zebra ball", "red ball"], TEMPLATES)
    assert "never learned zebra" in caplog.text
    torch.testing.assert_close(both[0], both[1])  # left out, as a bundle does


def test_a_damaged_packed_clip_is_refused(tmp_path):
    path = tmp_path / "packed.safetensors"
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_shipped(path)
    path.write_bytes(save_clip(tmp_path / "whole.safetensors").read_bytes())
    with refused(CheckpointError, None, "packed.safetensors"):
        read_shipped(path)


def test_export_remarks_on_a_model_of_one_class(tmp_path, caplog):
    clip = save_clip(tmp_path / "tiny.safetensors")
    options = {"pretrained": str(clip), "activation": "quick_gelu", "image_size": 64}
    own = {"evaluation": {"limit": 2}, "output": {"folder": str(tmp_path / "run")}}
    own["model"] = {"options": options | {"num_prompts": 2}}
    measured = train(TrainConfig.from_dict(TABLES | own)).metrics["top class"]
    assert 0 < measured <= 100
    path = tmp_path / "run" / "evaluations.json"
    report = json.loads(path.read_text())
    report["evaluations"]["2"]["top class"] = 99.5
    path.write_text(json.dumps(report))
    export_trained(tmp_path / "run", tmp_path / "a.zsseg", precisions=("float32",))
    assert "gives one class 99.5 % of the pixels of its evaluation" in caplog.text
