"""ZegCLIP against the official code's outputs: what it does not share with CLIP-RC."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from support import tiny
from support.descriptor_models import run_parts
from support.golden import assert_close, load
from support.golden_descriptor import SmallCase, official_layouts, unread
from zsseg_rt.export.architectures.descriptor import parts_of
from zsseg_rt.models import functional
from zsseg_rt.models.clip.towers import average_templates
from zsseg_rt.models.clip.weights import build_text_encoder
from zsseg_rt.models.descriptor.model import DecoderLayer
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.torch_files.clip_weights import ClipWeights

pytestmark = [pytest.mark.needs_shared, pytest.mark.usefixtures("without_gradients")]


@pytest.fixture(scope="module")
def small(shared_dir):
    return SmallCase(shared_dir, "zegclip")


def test_small_relationship_descriptor(small):
    cls_embed, text = torch.from_numpy(small.golden["cls_feat"]), small.text.float()
    projection = small.model.decode_head.q_proj
    assert_close(functional.describe(cls_embed, text), small.golden["q_proj_in"])
    queries = functional.relationship_descriptor(
        cls_embed, text, projection.weight, projection.bias
    )
    assert_close(queries, small.golden["q_proj_out"])


def test_small_decoder_layers(small):
    memory = torch.from_numpy(small.golden["patch_feat"]).flatten(2).transpose(1, 2)
    queries = torch.from_numpy(small.golden["q_proj_out"])
    for index, layer in enumerate(small.model.decode_head.decoder_1.layers):
        assert isinstance(layer, DecoderLayer)
        masks = layer.multihead_attn.mask_logits(queries, memory)
        queries = layer(queries, memory)
        assert_close(masks.unflatten(2, (4, 4)), small.golden[f"dec{index}_mask"])
        assert_close(queries, small.golden[f"dec{index}_q"])


def test_small_other_image_size(small):
    image = torch.from_numpy(small.golden["alt_image"])
    low_logits = small.model(image, small.text).mask_logits
    assert_close(low_logits.flatten(2), small.golden["alt_low_attn"])
    assert_close(small.model.upsample(low_logits), small.golden["alt_mask_logits_up"])
    assert_close(small.model.predict(image, small.text), small.golden["alt_pred"])


def test_small_text_embeds_of_one_template(small):
    embeds = small.model.text_encoder(torch.from_numpy(small.golden["text_tokens"]))
    assert_close(average_templates(embeds[:, None]), small.golden["text_encoder_out_normed"])


@pytest.mark.parametrize("which", ["train_inductive", "train_selftrain"])
def test_small_training_masks_and_gradients(small, which):
    model = small.build(prompt_dropout=0.0, decoder_dropout=0.0).train()
    text = small.text[small.config["seen"]] if which == "train_inductive" else small.text
    with torch.enable_grad():
        logits = model.upsample(
            model(torch.from_numpy(small.golden["train_image"]), text).mask_logits
        )
        logits.square().sum().backward()
    assert_close(logits.detach(), small.golden[f"{which}/pred_masks"])
    without = {name for name, tensor in model.trainable_parameters() if tensor.grad is None}
    assert without == {key for key in small.golden[f"{which}/no_grad_keys"] if not unread(key)}


def test_small_folded_parts_of_several_pictures(small):
    _, cls_embed = parts_of(small.model).encode(Arrays(), small.image.numpy())
    assert_close(torch.from_numpy(cls_embed), small.golden["cls_feat"])
    logits = run_parts(small.model, small.image, small.text.float())
    assert_close(logits, small.golden["low_logits"])


def test_real_text_encoder_and_tokens(shared_dir):
    golden, tokens = (
        load(shared_dir, name) for name in ("zegclip_text_real_public.npz", "zs_tokens_public.npz")
    )
    shapes = next(iter(official_layouts(shared_dir, "zegclip").values()))["shapes"]
    prefix = "text_encoder."
    weights = {
        key: tiny.rule_tensor(key, size, str(golden["salt"]))
        for key, size in shapes.items()
        if key.startswith(prefix)
    }
    encoder = text_tower({key.removeprefix(prefix): value for key, value in weights.items()})
    voc = encoder(torch.from_numpy(tokens["voc_single"].astype(np.int64)))
    assert_close(voc, golden["voc_single_raw"])
    assert_close(average_templates(voc[:, None]), golden["voc_single_normed"])
    multi = encoder(torch.from_numpy(tokens["coco_multi"][7].astype(np.int64)))
    assert_close(average_templates(multi), golden["coco_class7_multi"])


def text_tower(weights: dict[str, Tensor]):
    return build_text_encoder(ClipWeights(visual={}, text=weights, activation="quick_gelu"))


def test_tokens_of_open_clip(shared_dir):
    open_clip = pytest.importorskip("open_clip")
    golden = load(shared_dir, "zs_tokens_public.npz")
    splits = json.loads((shared_dir / "specs" / "splits.json").read_text())
    prompts = [f"a photo of a {name}" for name in splits["voc12_20"]["classes"]]
    assert np.array_equal(open_clip.tokenize(prompts).numpy(), golden["voc_single"])
    classes = splits["cocostuff164k_171"]["classes"]
    for index, template in enumerate(golden["templates"]):
        ids = open_clip.tokenize([str(template).format(name) for name in classes])
        assert np.array_equal(ids.numpy(), golden["coco_multi"][:, index])
