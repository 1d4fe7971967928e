"""Checkpoint files and CLIP weights: what loads, and what is refused in which words."""

from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from support import tiny
from support.errors import refused
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models import (
    build_image_encoder,
    build_text_encoder,
    from_official,
    load_checkpoint,
    load_clip,
)


def test_seen_classes_are_indices_of_any_kind_and_no_mask():
    def build(**settings):
        return from_official("zegclip", tiny.zegclip_state_dict(), num_heads=4, **settings)

    for seen in (np.array([0, 2]), torch.tensor([0, 2]), (0, np.int64(2))):
        assert build(seen_classes=seen).config.seen_classes == (0, 2)
    for seen in (None, 3, [0.7], ["a"], [True, False], np.ones(3, bool), torch.ones(3)):
        with refused(ArgumentError, "seen_classes"):
            build(seen_classes=seen)
    for size in (0, -3, (64, 64)):  # of masks: one side
        with refused(ArgumentError, "image_size"):
            build(image_size=size)


class Beside:
    """A class of a trainer's, which is not imported to read the weights."""


BESIDE = {
    "optimizer": Beside(),
    "args": Namespace(lr=1e-3, out=Path("runs"), device=torch.device("cpu"), kind=np.mean),
    "best": np.float64(0.5),
    "history": deque([1.0], maxlen=3),
    "per_class": defaultdict(list, road=[np.arange(3)]),
    "names": {"road", "car"},
    "sparse": torch.eye(2).to_sparse(),
    "model": "ViT-B-16",
}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("with_zip", [True, False])
def test_weights_are_read_from_whatever_a_trainer_saves(tmp_path, prefix, protocol, with_zip):
    state_dict = tiny.zegclip_state_dict()
    wrapped = OrderedDict((prefix + key, value) for key, value in state_dict.items())
    form = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": with_zip}
    torch.save(BESIDE | {"state_dict": wrapped}, tmp_path / "a.pth", **form)
    assert tiny.same(load_checkpoint(tmp_path / "a.pth"), state_dict)


class Averaged(nn.Module):
    """As torch.optim.swa_utils.AveragedModel: a counter beside the wrapped model."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.register_buffer("n_averaged", torch.tensor(1))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


SAVED = {
    "a pickled module": lambda model: model,
    "a module under a name, and none": lambda model: {"model": None, "ema": model.half().float()},
    "an average": Averaged,
    "an average's weights": lambda model: Averaged(model).state_dict(),
    "DeepSpeed's": lambda model: {"module": model.state_dict(), "optimizer": {"state": {}}},
    "holders in holders": lambda model: {"checkpoint": {"model": model.state_dict()}},
    "compiled inside": lambda model: {f"_orig_mod.{k}": v for k, v in model.state_dict().items()},
}


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_weights_are_found_where_trainers_put_them(tmp_path, saved):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(saved(model), tmp_path / "a.pth")
    assert tiny.same(load_checkpoint(tmp_path / "a.pth"), model.state_dict())


def test_what_lies_beside_wrapped_weights_is_named(tmp_path, caplog):
    weights = {"model.a": torch.ones(1), "model.b": torch.ones(1), "loss.w": torch.ones(1)}
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").keys() == {"a", "b"}
    assert "loss.w" in caplog.text


def test_two_sets_of_weights_are_not_chosen_from(tmp_path):
    one = {"w": torch.ones(1)}
    torch.save({"student": one, "teacher": one}, tmp_path / "a.pth")
    with refused(CheckpointError, "a.pth", "student", "teacher"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, world\n", b"\x80\x02]q\x00", b"PK\x03\x04" * 9])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: expected a checkpoint file"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(3)])
def test_files_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with refused(CheckpointError, "a.pth"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["none.pth", "n" * 5000, "a\0b"], ids=["absent", "long", "zero"])
def test_absent_file_is_named(tmp_path, name):
    with refused(CheckpointError, "path"):
        load_checkpoint(tmp_path / name)


class Holder(nn.Module):
    """A module whose state_dict has the given keys."""

    def __init__(self, state_dict):
        super().__init__()
        for key, value in state_dict.items():
            *path, name = key.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(name, value)

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    torch.manual_seed(0)
    model = CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 64, "layers": 3, "width": 128, "patch_size": 16},
        text_cfg={
            "context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 2
        },
        quick_gelu=True,
    ).eval()  # fmt: skip
    assert open_clip.__version__
    return model


@pytest.mark.parametrize("form", ["half archive", "state_dict", "safetensors"])
@torch.no_grad()
def test_towers_equal_open_clip(tmp_path, open_clip_model, form):
    state_dict = {key: value.clone() for key, value in open_clip_model.state_dict().items()}
    path, tolerance = tmp_path / "clip.pt", 1e-5
    if form == "half archive":
        halves = {key: value.half() for key, value in state_dict.items()}
        sizes = {"input_resolution": torch.tensor(64), "vocab_size": torch.tensor(64)}
        torch.jit.script(Holder(halves | sizes)).save(str(path))
        tolerance = 1e-2
    else:
        path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
        (save_file if form == "safetensors" else torch.save)(state_dict, path)
    weights = load_clip(path, activation="quick_gelu")
    image, tokens = tiny.image(2, 3, 64, 64), torch.randint(1, 60, (5, 16))
    tokens[torch.arange(5), torch.tensor([3, 15, 7, 9, 0])] = 63
    cls_embed = build_image_encoder(weights)(image).cls_embed
    expected = open_clip_model.encode_image(image, normalize=True)
    torch.testing.assert_close(cls_embed, expected, rtol=0, atol=tolerance)
    text_embeds = build_text_encoder(weights)(tokens)
    torch.testing.assert_close(
        text_embeds, open_clip_model.encode_text(tokens), rtol=0, atol=10 * tolerance
    )


def test_other_files_are_not_clip(tmp_path):
    torch.save(tiny.zegclip_state_dict(), tmp_path / "clip.pt")
    with refused(CheckpointError, "clip.pt"):
        load_clip(tmp_path / "clip.pt", activation="gelu")


def test_tag_brings_weights_heads_and_activation(monkeypatch, open_clip_model):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: open_clip_model)
    weights = load_clip("openai")
    assert weights.settings[:3] == ("quick_gelu", 2, 1)
    assert build_image_encoder(weights).config.width == 128
