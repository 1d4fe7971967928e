"""A small CLIP learns from captions, is read like any other CLIP, and survives interruption."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.errors import refused
from tools.scenes import CLASS_NAMES
from tools.studies import clip_pretraining
from tools.studies.caption_batches import NEVER_CAPTIONED, CaptionBatches
from tools.studies.clip_checks import (
    TEMPLATES,
    classify_views,
    load_run,
    score_dense_heads,
)
from tools.studies.clip_pretraining import ClipTask, contrastive_loss, pretrain
from tools.studies.small_clip import PretrainingConfig, SmallClip
from zsseg_rt.errors import ArgumentError, CheckpointError, TrainingError
from zsseg_rt.export.tokenizer_json import tokenizer_json
from zsseg_rt.models import create_model
from zsseg_rt.text.tokenizer import Tokenizer
from zsseg_rt.torch_files.clip_weights import load_clip
from zsseg_rt.training.class_embeddings import embed_phrases

TINY = PretrainingConfig(
    steps=3,
    batch_size=8,
    warmup_steps=1,
    checkpoint_interval=2,
    width=64,
    num_layers=1,
    text_width=64,
    text_layers=1,
    embed_dim=32,
    whole_every=2,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return pretrain(TINY, folder, num_workers=0)


def test_perfect_embeddings_cost_nothing_and_swapped_ones_much():
    embeds = torch.eye(4)
    order = torch.arange(4)
    scale = torch.tensor(100.0)
    assert contrastive_loss(embeds, embeds, order, scale) < 1e-6
    assert contrastive_loss(embeds, embeds.roll(1, 0), order, scale) > 50


def test_pictures_with_one_caption_are_no_negatives():
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(torch.randn(2, 8, generator=generator), dim=1)
    scale = torch.tensor(10.0)
    logits = 10 * images @ texts.T  # pictures 0 and 1 share caption 0
    rows = [(0, 0), (1, 0), (2, 1)]
    to_text = [-torch.log_softmax(logits[i], 0)[c] for i, c in rows[:2]]
    to_text.append(-(logits[2, 1] - torch.logsumexp(logits[2, [0, 0, 1]], 0)))
    to_image = [-(logits[i, 0] - torch.logsumexp(logits[[i, 2], 0], 0)) for i in (0, 1)]
    to_image.append(-(logits[2, 1] - torch.logsumexp(logits[:, 1], 0)))
    expected = (sum(to_text) / 3 + sum(to_image) / 3) / 2
    found = contrastive_loss(images, texts, torch.tensor([0, 0, 1]), scale)
    torch.testing.assert_close(found, expected)


def test_batches_depend_on_their_step_alone():
    first, again = (CaptionBatches(steps=4, batch_size=8, whole_every=2) for _ in range(2))
    for step in (3, 0):
        a, b = first[step], again[step]
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)
    assert first[0].images.shape == (8, 3, 64, 64)
    assert first[1].images.shape == (4, 3, 128, 128)
    assert not torch.equal(first[0].images, first[2].images)
    other = CaptionBatches(steps=4, batch_size=8, whole_every=2, seed=1)
    assert not torch.equal(first[0].images, other[0].images)


def test_captions_fit_and_leave_out_what_is_held_back():
    from tokenizers import Tokenizer as JsonTokenizer

    assert not set(NEVER_CAPTIONED) & set(CLASS_NAMES)
    assert len(NEVER_CAPTIONED) > 15
    reader = JsonTokenizer.from_str(tokenizer_json())
    batches = CaptionBatches(steps=40, batch_size=64)
    for step in (0, 3):
        tokens = batches[step].tokens
        assert (tokens[:, -1] == 0).all() or (tokens[:, -1] == tokens.max()).all()
        for row in tokens.numpy():
            ends = np.flatnonzero(row == row.max())
            assert len(ends) == 1
            text = reader.decode(row[1 : ends[0]].tolist()).replace("</w>", " ")
            assert not any(name in text for name in NEVER_CAPTIONED), text


@pytest.mark.nightly
def test_workers_start_where_opencv_has_threads():
    code = """
import cv2, numpy as np
from tools.studies.clip_pretraining import _batch_source
from tools.studies.small_clip import PretrainingConfig

cv2.setNumThreads(2)
cv2.GaussianBlur(np.zeros((2000, 2000), np.float32), (31, 31), 5)  # its threads run now
config = PretrainingConfig(steps=1, batch_size=4)
places = {"start_position": 0, "process_index": 0, "num_processes": 1, "batch_size": 4}
batch = next(_batch_source(config, 1)(**places))
assert cv2.getNumThreads() == 2
print(len(batch.tokens))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@pytest.mark.nightly
def test_loss_falls():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, batch_size=32, whole_every=100)
    task = ClipTask(SmallClip(config), config)
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=2e-3)
    batches = CaptionBatches(steps=30, batch_size=32, whole_every=100)
    history = []
    for step in range(30):
        terms = task(batches[step])
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert np.mean(history[-5:]) < np.mean(history[:3]) - 0.4
    assert set(terms) == {"contrastive", "patches"}


def test_other_code_reads_the_weights(run):
    weights = load_clip(run, activation="quick_gelu")
    assert weights.text["positional_embedding"].shape == (24, 64)
    dense = create_model("dense_clip", pretrained=run, activation="quick_gelu", head="naclip")
    model = create_model("zegclip", pretrained=run, activation="quick_gelu", image_size=128)
    small = SmallClip(TINY)
    small.load_open_clip_state_dict(load_file(run))
    tokens = Tokenizer(tokenizer_json(), context_length=24).encode(["a photo of a red ball."])
    tokens = torch.from_numpy(tokens)
    for other in (dense, model):
        found = torch.nn.functional.normalize(other.text_encoder(tokens), dim=-1)
        torch.testing.assert_close(found, small.encode_texts(tokens))
    image = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    mean = torch.tensor(dense.image_mean).view(3, 1, 1)
    std = torch.tensor(dense.image_std).view(3, 1, 1)
    _, cls_embed = dense.image_encoder((image / 255 - mean) / std)
    torch.testing.assert_close(cls_embed, small.encode_images(image)[0])


def test_short_rows_give_the_same_text_embeddings(run):
    encoder = create_model("dense_clip", pretrained=run, activation="quick_gelu").text_encoder
    tokens = Tokenizer(tokenizer_json(), context_length=24).encode(["a red ball", "grass"])
    tokens = torch.from_numpy(tokens)
    torch.testing.assert_close(encoder.embed(tokens[:, :6]), encoder(tokens))


def test_an_interrupted_run_goes_on_to_the_same_weights(run, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    class Interrupted(CaptionBatches):
        def __getitem__(self, step):
            if step == 2:
                raise StoppedError
            return super().__getitem__(step)

    monkeypatch.setattr(clip_pretraining, "CaptionBatches", Interrupted)
    with pytest.raises(StoppedError):
        pretrain(TINY, tmp_path, num_workers=0)
    assert not (tmp_path / "clip.safetensors").exists()
    monkeypatch.undo()
    resumed = pretrain(TINY, tmp_path, num_workers=0)
    expected, found = load_file(run), load_file(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def full_disk(monkeypatch):
    """Let writing the file of this name fail; the space before the failure is used up."""

    def fill(name):
        def failing(call):
            def fail(source, target, **settings):
                if os.fspath(target).endswith(name):
                    raise OSError(28, "No space left on device")
                call(source, target, **settings)

            return fail

        for call in ("link", "replace"):
            monkeypatch.setattr(os, call, failing(getattr(os, call)))

    return fill


def test_full_disk_at_the_end_loses_nothing(run, tmp_path, full_disk, monkeypatch):
    full_disk("clip.safetensors")
    message = (
        "clip.safetensors: cannot be written: No space left.*saved in .*step-00000003.pt; call"
    )
    with pytest.raises(TrainingError, match=message):
        pretrain(TINY, tmp_path, num_workers=0)
    assert not [path for path in tmp_path.iterdir() if "clip" in path.name]
    monkeypatch.undo()
    monkeypatch.setattr(ClipTask, "forward", None)  # nothing is trained again
    expected, found = load_file(run), load_file(pretrain(TINY, tmp_path, num_workers=0))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_full_disk_keeps_earlier_weights(run, full_disk):
    before = run.read_bytes()
    full_disk("clip.safetensors")
    with pytest.raises(TrainingError, match="No space left"):
        pretrain(TINY, run.parent, num_workers=0)
    assert run.read_bytes() == before


def test_full_disk_at_the_start_leaves_no_half_file(tmp_path, full_disk):
    full_disk("config.json")
    with refused(TrainingError, None, "config.json"):
        pretrain(TINY, tmp_path / "run", num_workers=0)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("content", ['{"steps": 3', "[3]"])
def test_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for read in (load_run, lambda folder: pretrain(TINY, folder, num_workers=0)):
        with refused(CheckpointError, None, "config.json"):
            read(tmp_path)


def test_another_configuration_is_not_resumed(run):
    other = dataclasses.replace(TINY, learning_rate=1.0)
    with refused(TrainingError, None, "learning_rate"):
        pretrain(other, run.parent, num_workers=0)


@pytest.mark.nightly
def test_checks_are_chances_for_untrained_weights(run):
    model = load_run(run.parent)
    scores = classify_views(model, num_scenes=20)
    assert 0 <= scores.things < 0.1
    assert 0 <= scores.classes < 0.5
    text_embeds = embed_phrases(model.text, CLASS_NAMES, TEMPLATES)
    heads = dict(score_dense_heads(run, text_embeds, num_scenes=2))
    assert set(heads) >= {"naclip", "maskclip"}
    assert all(0 <= scores.pixel_accuracy < 0.5 for scores in heads.values())


def test_checks_need_a_run(tmp_path):
    with refused(CheckpointError, None, "config.json"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"width": 100}, "width"),
        ({"view_size": 60}, "view_size"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with refused(ArgumentError, message):
        PretrainingConfig(**setting)
