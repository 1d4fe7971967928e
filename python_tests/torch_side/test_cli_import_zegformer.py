"""Official ZegFormer checkpoints become bundles from the command line."""

import numpy as np
import pytest
import torch

from support import tiny, tiny_zegformer
from support.command_line import run
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.models import from_official, load_clip
from zsseg_rt.torch_files.zegformer_arrays import SEGMENT_TEMPLATES

CLIP = tiny_zegformer.CLIP
NAMES = ["road", "person", "car", "sky", "tree", "dog", "cat"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the authors publish: a checkpoint of training, and OpenAI's CLIP beside it.

    The query decoder has eight heads, as in every official model.
    """
    folder = tmp_path_factory.mktemp("official")
    state_dict = tiny_zegformer.state_dict()
    trained = {key: value for key, value in state_dict.items() if not key.startswith(CLIP)}
    clip = {
        key.removeprefix(CLIP): value for key, value in state_dict.items() if key.startswith(CLIP)
    }
    content = {"model": trained, "optimizer": {"state": {}}, "iteration": 9999}
    torch.save(content, folder / "model_final.pth")
    torch.save({"model": state_dict}, folder / "model_eval.pth")
    words = torch.from_numpy(tiny.random_normal("words", (49408, 64))).float()
    clip |= {"token_embedding.weight": words, "positional_embedding": torch.zeros(77, 64)}
    torch.save(clip, folder / "ViT-B-16.pt")
    return folder


def test_imported_bundle_agrees_with_the_model(files, tmp_path, capsys):
    out = tmp_path / "zegformer.zsseg"
    code = run("import-checkpoint", "zegformer", files / "model_final.pth", "--out", out,
               "--clip", files / "ViT-B-16.pt", "--classes", ",".join(NAMES), "--seen",
               "road,car", "--prompts", "imagenet_select", "--size", "96x64", "--precision",
               "float32", "--calibration", "0.2")  # fmt: skip
    assert code == 0, capsys.readouterr().err
    bundle = Bundle.load(out)
    assert bundle.family == "proposals"
    assert bundle.head.seen == ("road", "car")
    assert bundle.head.seen_bias == pytest.approx(0.2)
    assert bundle.text.templates == SEGMENT_TEMPLATES
    clip = load_clip(files / "ViT-B-16.pt", activation="quick_gelu")
    trained = torch.load(files / "model_final.pth", weights_only=True)["model"]
    model = from_official("zegformer", trained, clip=clip, seen_classes=(0, 2), calibration=0.2)
    picture = tiny_zegformer.picture(96, 64)
    texts = [tiny_zegformer.text_features(salt) for salt in "ab"]
    with torch.inference_mode():
        maps = model([picture], *texts, [(96, 64)]).sem_seg[0].numpy()
    frame = np.ascontiguousarray(picture.numpy().transpose(1, 2, 0))
    with Engine(bundle, EngineConfig(device="cpu", precision="float32", use_cache=False)) as engine:
        engine.set_classes(NAMES, embeddings=np.stack([text.numpy() for text in texts]))
        labels = engine.segment(frame).labels
    ranked = np.sort(maps, axis=0)
    clear = ranked[-1] - ranked[-2] > 2e-4  # a flipped mask pixel moves scores by up to 1e-3
    assert clear.mean() > 0.8
    assert (labels == maps.argmax(0))[clear].all()


def refused(capsys, *arguments):
    """Exit code and the one line that says why."""
    code = run("import-checkpoint", "zegformer", *arguments)
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("zsseg-rt: ")]
    assert len(lines) == 1
    return code, lines[0]


def test_a_checkpoint_of_training_needs_clip(files, tmp_path, capsys):
    out = tmp_path / "x.zsseg"
    code, error = refused(capsys, files / "model_final.pth", "--out", out)
    assert code == 1
    assert "expected CLIP's weights under 'sem_seg_head.predictor.clip_model.'" in error
    assert not out.exists()


def test_a_missing_clip_file_is_named(files, tmp_path, capsys):
    arguments = (files / "model_final.pth", "--out", tmp_path / "x.zsseg", "--clip")
    code, error = refused(capsys, *arguments, tmp_path / "gone.pt")
    assert code == 1
    assert "gone.pt" in error


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, capsys):
    path = tmp_path / "zegclip.pth"
    torch.save({"state_dict": tiny.zegclip_state_dict()}, path)
    code, error = refused(capsys, path, "--out", tmp_path / "x.zsseg")
    assert code == 1
    assert "backbone.res2.0.conv1.weight: expected a tensor of 4 axes, as in zegformer" in error


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "--fusion",
            "max",
            "--fusion: expected one of seen_and_unseen, all_classes, regions, segments, got 'max'",
        ),
        ("--prompts", "long", "--prompts: expected one of single, imagenet_select, got long"),
        ("--size", "100", "--size: expected multiples of 32"),
        (
            "--region-style",
            "box",
            "--region-style: expected one of cropmask, mask, crop",
        ),
    ],
)
def test_settings_outside_their_range(files, tmp_path, capsys, option, value, message):
    arguments = (files / "model_eval.pth", "--out", tmp_path / "x.zsseg", option, value)
    code, error = refused(capsys, *arguments)
    assert code in (1, 2)
    assert message in error
