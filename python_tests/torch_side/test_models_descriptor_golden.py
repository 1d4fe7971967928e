"""ZegCLIP and CLIP-RC against their official codes' outputs, by torch, NumPy and OpenVINO."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import tiny
from support.descriptor_models import run_parts
from support.golden import (
    MIN_AGREEMENT,
    REAL_TOLERANCE,
    arguments_of,
    assert_close,
    config_of,
    load,
    state_dict_of,
)
from zsseg_rt.export import export_graphs
from zsseg_rt.models import from_official, slide_predict
from zsseg_rt.models.base import prepare_image, slide_scores
from zsseg_rt.models.clip.towers import average_templates
from zsseg_rt.models.clip.weights import build_text_encoder
from zsseg_rt.torch_files.clip_arrays import ClipTensors, Tower

# What the two systems' files are called, and what the vectors' models are built without.
FILES = {"zegclip": "zegclip", "clip_rc": "cliprc"}
_SKIPPED = {
    "zegclip": ("text_encoder.",),
    "clip_rc": ("text_encoder.", "decode_head.recovery_decoder."),
}


class SmallCase:
    """The small vectors, which hold every intermediate."""

    def __init__(self, shared_dir: Path, architecture: str) -> None:
        self.architecture = architecture
        self.golden = load(shared_dir, f"{FILES[architecture]}_small_public.npz")
        self.config = config_of(self.golden)
        self.state_dict = state_dict_of(self.golden)
        self.model = self.build()
        self.image = torch.from_numpy(self.golden["image"])
        self.text = torch.from_numpy(self.golden["text_embeddings"])

    def build(self, **settings: Any) -> Any:
        """The model with some settings changed."""
        arguments = arguments_of(self.config) | settings
        return from_official(self.architecture, self.state_dict, **arguments)


class RealCase:
    """Vectors at the official size, and the model of their rule."""

    def __init__(self, shared_dir: Path, architecture: str, dataset: str) -> None:
        self.golden = load(shared_dir, f"{FILES[architecture]}_real_{dataset}_public.npz")
        config = config_of(self.golden)
        shapes = official_layouts(shared_dir, architecture)[config["config"]]["shapes"]
        skipped = _SKIPPED[architecture]
        shapes = {key: size for key, size in shapes.items() if not key.startswith(skipped)}
        state_dict = tiny.rule_state_dict(shapes, config["salt"], config["gains"])
        self.model = from_official(architecture, state_dict, seen_classes=config["seen"])
        num_classes = self.golden["low_logits"].shape[1]
        self.text: Tensor = tiny.text_embeds(num_classes, 512, config["salt"])
        self.image: Tensor = tiny.image(1, 3, 512, 512, salt=config["salt"])


def official_layouts(shared_dir: Path, architecture: str) -> dict[str, Any]:
    """Keys, shapes and parameter counts of the official checkpoints, by name."""
    path = shared_dir / "specs" / f"statedict_{FILES[architecture]}.json"
    return json.loads(path.read_text())


def unread(key: str) -> bool:
    """Whether it names a tensor of official checkpoints that no forward pass reads."""
    return "self_attn." in key or "norm1." in key


pytestmark = [pytest.mark.needs_shared, pytest.mark.usefixtures("without_gradients")]

ARCHITECTURES = ("zegclip", "clip_rc")
STATE_DICTS = {"zegclip": tiny.zegclip_state_dict, "clip_rc": tiny.clip_rc_state_dict}


# ---------------------------------------------------------------- small


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small(request, shared_dir):
    return SmallCase(shared_dir, request.param)


def test_the_tiny_builder_follows_the_reference_rule(small):
    built = STATE_DICTS[small.architecture]()
    assert built.keys() == small.state_dict.keys()
    assert all(torch.equal(built[key], value) for key, value in small.state_dict.items())


def test_small_scores(small):
    output = small.model(small.image, small.text)
    assert_close(output.mask_logits, small.golden["low_logits"])
    assert_close(output.patch_embeds, small.golden["patch_feat"])
    assert_close(output.cls_embed, small.golden["cls_feat"])
    if small.architecture == "clip_rc":
        assert_close(output.cell_embeds, small.golden["rlb_feat"])
    scores = small.model.predict(small.image, small.text)
    assert_close(small.model.upsample(output.mask_logits), small.golden["mask_logits_up"])
    assert_close(scores, small.golden["pred"])
    assert np.mean(scores.argmax(1).numpy() == small.golden["pred_argmax"]) >= MIN_AGREEMENT
    trained = small.build(self_trained=True).predict(small.image, small.text)
    assert_close(trained, small.golden["pred_self_training"])
    if "alt_image" in small.golden.files:  # another size
        image = torch.from_numpy(small.golden["alt_image"])
        low_logits = small.model(image, small.text).mask_logits
        assert_close(low_logits.flatten(2), small.golden["alt_low_attn"])
        assert_close(small.model.upsample(low_logits), small.golden["alt_mask_logits_up"])
        assert_close(small.model.predict(image, small.text), small.golden["alt_pred"])


def test_small_whole_image(small):
    golden, model, text = small.golden, small.model, small.text
    rgb, crop, stride = golden["raw_rgb"], small.config["crop"], small.config["stride"]
    image = prepare_image(rgb, short_side=crop, mean=model.image_mean, std=model.image_std)
    assert_close(image, golden["pipe_image"])
    averaged = slide_scores(
        lambda window: model.predict(window, text), image, crop_size=crop, stride=stride
    )
    assert_close(averaged, golden["slide_raw"])
    sizes = {"short_side": crop, "crop_size": crop, "stride": stride}
    rescaled = slide_predict(model, rgb, text, **sizes, softmax=False)
    assert_close(rescaled[None], golden["slide_rescaled"])
    probabilities = slide_predict(model, rgb, text, **sizes)
    assert_close(probabilities[None], golden["slide_softmax"])
    labels = probabilities.argmax(0).numpy()
    assert np.mean(labels == golden["slide_argmax"]) >= MIN_AGREEMENT


def test_small_text_encoder(small):
    embeds = small.model.text_encoder(torch.from_numpy(small.golden["text_tokens"]))
    assert_close(embeds, small.golden["text_encoder_out"])
    if "text_encoder_out_normed" in small.golden.files:
        mean = average_templates(embeds[:, None])
        assert_close(mean, small.golden["text_encoder_out_normed"])


@pytest.mark.parametrize("computed", ["numpy", "openvino"])
def test_small_network(small, computed, tmp_path):
    graphs = None
    if computed == "openvino":
        written = export_graphs(small.model, tmp_path, precisions=("float32",))
        graphs = {name: tmp_path / files["float32"].file for name, files in written.items()}
    logits = run_parts(small.model, small.image, small.text.float(), graphs)
    assert_close(logits, small.golden["low_logits"])


# ---------------------------------------------------------------- real sizes


def real_cases(*datasets):
    """ZegCLIP on VOC in every run; the small vectors hold the others' arithmetic."""
    return [
        pytest.param((a, d), marks=() if (a, d) == ("zegclip", "voc") else pytest.mark.nightly,
                     id=f"{a}-{d}")
        for a in ARCHITECTURES for d in datasets
    ]  # fmt: skip


@pytest.fixture(scope="module", params=real_cases("voc", "coco"))
def real(request, shared_dir):
    return real_case(shared_dir, *request.param)


real_case = functools.lru_cache(maxsize=1)(RealCase)


def test_real_scores(real):
    outputs = []
    handle = real.model.register_forward_hook(lambda *call: outputs.append(call[2]))
    scores = real.model.predict(real.image, real.text)
    handle.remove()
    golden, (output,) = real.golden, outputs
    folded = run_parts(real.model, real.image, real.text)
    for logits in (output.mask_logits, folded):
        assert np.abs(logits.numpy() - golden["low_logits"]).max() <= REAL_TOLERANCE
    assert_close(output.cls_embed, golden["cls_feat"])
    if "rlb_feat" in golden.files:  # CLIP-RC's
        assert_close(output.cell_embeds, golden["rlb_feat"])
    if "patch_feat" in golden.files:
        assert_close(output.patch_embeds, golden["patch_feat"])
    assert_close(scores[:, :, ::8, ::8], golden["pred_sub8"], REAL_TOLERANCE)
    assert np.mean(scores.argmax(1).numpy() == golden["pred_argmax"]) >= MIN_AGREEMENT


@pytest.mark.parametrize("real", real_cases("voc"), indirect=True)
def test_real_whole_image(real):
    golden = real.golden
    rgb = golden["raw_rgb"]
    image = prepare_image(rgb, short_side=512, mean=real.model.image_mean, std=real.model.image_std)
    assert tuple(image.shape) == tuple(golden["pipe_shape"])
    assert_close(image[:, :, ::8, ::8], golden["pipe_sub8"])
    probabilities = slide_predict(real.model, rgb, real.text)
    assert_close(probabilities[None, :, ::5, ::5], golden["slide_softmax_sub5"], REAL_TOLERANCE)
    labels = probabilities.argmax(0).numpy()
    assert np.mean(labels == golden["slide_argmax"]) >= MIN_AGREEMENT


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_official_layout_loads(shared_dir, architecture):
    layouts = official_layouts(shared_dir, architecture)
    assert len(layouts) == {"zegclip": 7, "clip_rc": 6}[architecture]
    for entry in layouts.values():
        with torch.device("meta"):
            state_dict = {key: torch.empty(size) for key, size in entry["shapes"].items()}
        model = from_official(architecture, state_dict)
        assert model.architecture == architecture
        assert model.config.image_size == 512
        if architecture == "clip_rc":
            assert model.config.image_encoder.num_cells == 16
        never_read = sum(
            int(np.prod(size))
            for key, size in entry["shapes"].items()
            if key.startswith("decode_head.") and unread(key)
        )
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == entry["params"]["trainable"] - never_read


def test_real_text_encoder_and_tokens(shared_dir):
    golden, tokens = (
        load(shared_dir, name) for name in ("zegclip_text_real_public.npz", "zs_tokens_public.npz")
    )
    shapes = next(iter(official_layouts(shared_dir, "zegclip").values()))["shapes"]
    prefix = "text_encoder."
    weights: dict[str, Tensor] = {
        key.removeprefix(prefix): tiny.rule_tensor(key, size, str(golden["salt"]))
        for key, size in shapes.items()
        if key.startswith(prefix)
    }
    encoder = build_text_encoder(ClipTensors(visual=Tower({}), text=Tower(weights)))
    voc = encoder(torch.from_numpy(tokens["voc_single"].astype(np.int64)))
    assert_close(voc, golden["voc_single_raw"])
    assert_close(average_templates(voc[:, None]), golden["voc_single_normed"])
    multi = encoder(torch.from_numpy(tokens["coco_multi"][7].astype(np.int64)))
    assert_close(average_templates(multi), golden["coco_class7_multi"])
