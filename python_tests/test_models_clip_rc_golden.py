"""CLIP-RC against the official code's outputs."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch
from golden import (
    MIN_AGREEMENT,
    REAL_TOLERANCE,
    arguments_of,
    assert_close,
    config_of,
    load,
    record,
    state_dict_of,
)
from torch import Tensor

from zsseg_rt.models import from_official, functional, slide_predict
from zsseg_rt.models.clip_rc import ClipRC
from zsseg_rt.models.region_encoder import attention_allowed
from zsseg_rt.models.sliding import prepare_image, slide_scores

pytestmark = pytest.mark.needs_shared


@pytest.fixture(scope="module", autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def run_parts(parts, image: Tensor, text: Tensor) -> Tensor:
    """Low-resolution logits of pictures, which the parts take one by one."""
    logits = []
    for one in image.split(1):
        patch_embeds, cls_embed = parts.image_encoder(one)
        queries = functional.relationship_descriptor(
            cls_embed, text, parts.descriptor_weight, parts.descriptor_bias
        )
        class_embeds, patch_keys = parts.decoder(queries, patch_embeds)
        scaled = {"logit_scale": parts.logit_scale, "normalize": False}
        logits.append(functional.patch_text_similarity(patch_keys, class_embeds, **scaled))
    return torch.cat(logits).unflatten(2, parts.grid_hw)


# ---------------------------------------------------------------- small, every intermediate


@pytest.fixture(scope="module")
def small(shared_dir):
    return load(shared_dir, "cliprc_small_public.npz")


@pytest.fixture(scope="module")
def small_config(small):
    return config_of(small)


@pytest.fixture(scope="module")
def small_arguments(small_config):
    return arguments_of(small_config)


@pytest.fixture(scope="module")
def small_state_dict(small):
    return state_dict_of(small)


@pytest.fixture(scope="module")
def small_model(small_state_dict, small_arguments):
    return from_official("clip_rc", small_state_dict, **small_arguments)


@pytest.fixture(scope="module")
def small_text(small):
    return torch.from_numpy(small["text_embeddings"])


@pytest.fixture(scope="module")
def small_output(small, small_model, small_text):
    """The output, with what every submodule was given and gave."""
    image = torch.from_numpy(small["image"])
    return record(small_model, lambda: small_model(image, small_text))


def test_the_tiny_builder_follows_the_reference_rule(small_state_dict):
    built = tiny.clip_rc_state_dict()
    assert built.keys() == small_state_dict.keys()
    assert all(torch.equal(built[key], value) for key, value in small_state_dict.items())


def test_small_output(small, small_output):
    output, _ = small_output
    assert_close(output.mask_logits, small["low_logits"])
    assert_close(output.patch_embeds, small["patch_feat"])
    assert_close(output.cls_embed, small["cls_feat"])
    assert_close(output.region_embeds, small["rlb_feat"])
    assert output.recovery is None


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("stage", ["ln_pre", "block0", "block1", "block2", "block3", "ln_post"])
def test_small_image_encoder(small, small_output, stage, side):
    _, seen = small_output
    module = "backbone." + stage.replace("block", "transformer.resblocks.")
    assert_close(seen[module][side == "out"], small[f"{stage}_{side}"])


def test_small_prompt_norm(small, small_output):
    assert_close(small_output[1]["backbone.prompt_norm"][1], small["prompt_norm_out"])


def test_small_attention_mask(small, small_config):
    allowed = attention_allowed((4, 4), small_config["rlb"], small_config["ntok"])
    assert np.array_equal(allowed.numpy(), small["attn_allowed"] != 0)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("stage", ["q_proj", "lateral_proj"])
def test_small_projections(small, small_output, stage, side):
    assert_close(small_output[1]["decode_head." + stage][side == "out"], small[f"{stage}_{side}"])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_small_decoder_layers(small, small_output, index):
    _, seen = small_output
    assert_close(seen[f"decode_head.decoder_q.layers.{index}"][1], small[f"dec{index}_q"])
    assert_close(seen[f"decode_head.decoder_v.layers.{index}"][1], small[f"dec{index}_lateral"])


def test_small_masks_of_each_region(small, small_output):
    _, seen = small_output
    queries = seen["decode_head.decoder_q.layers.2"][1]
    patches = seen["decode_head.decoder_v.layers.2"][1]
    raw = functional.patch_text_similarity(patches, queries, normalize=False)
    assert_close(raw.unflatten(2, (4, 4)), small["attn_raw"])


def test_small_scores(small, small_model, small_text):
    image = torch.from_numpy(small["image"])
    low_logits = small_model(image, small_text).mask_logits
    scores = small_model.predict(image, small_text)
    assert_close(small_model.upsample(low_logits), small["mask_logits_up"])
    assert_close(scores, small["pred"])
    assert np.mean(scores.argmax(1).numpy() == small["pred_argmax"]) >= MIN_AGREEMENT


def test_small_scores_after_self_training(small, small_state_dict, small_arguments, small_text):
    model = from_official("clip_rc", small_state_dict, **small_arguments, self_trained=True)
    scores = model.predict(torch.from_numpy(small["image"]), small_text)
    assert_close(scores, small["pred_self_training"])


def test_small_whole_picture(small, small_config, small_model, small_text):
    rgb, crop, stride = small["raw_rgb"], small_config["crop"], small_config["stride"]
    statistics = {"mean": small_model.image_mean, "std": small_model.image_std}
    image = prepare_image(rgb, short_side=crop, **statistics)
    assert_close(image, small["pipe_image"])
    averaged = slide_scores(
        lambda window: small_model.predict(window, small_text),
        image,
        crop_size=crop,
        stride=stride,
    )
    assert_close(averaged, small["slide_raw"])
    sizes = {"short_side": crop, "crop_size": crop, "stride": stride}
    rescaled = slide_predict(small_model, rgb, small_text, **sizes, softmax=False)
    assert_close(rescaled[None], small["slide_rescaled"])
    probabilities = slide_predict(small_model, rgb, small_text, **sizes)
    assert_close(probabilities[None], small["slide_softmax"])
    labels = probabilities.argmax(0).numpy()
    assert np.mean(labels == small["slide_argmax"]) >= MIN_AGREEMENT


def test_small_text_encoder(small, small_model):
    features = small_model.text_encoder(torch.from_numpy(small["text_tokens"]))
    assert_close(features, small["text_encoder_out"])


@pytest.mark.parametrize("which", ["train_inductive", "train_selftrain"])
def test_small_training_masks_recovery_and_gradients(
    small, small_config, small_state_dict, small_arguments, small_text, which
):
    rates = {"prompt_dropout": 0.0, "decoder_dropout": 0.0}
    model = from_official("clip_rc", small_state_dict, **small_arguments, **rates).train()
    text = small_text[small_config["seen"]] if which == "train_inductive" else small_text
    with torch.enable_grad():
        output = model(torch.from_numpy(small["train_image"]), text)
        recovery = output.recovery
        query_loss = (recovery.queries - recovery.query_targets).abs().mean()
        patch_loss = (recovery.patches - recovery.patch_targets).abs().mean()
        masks = model.upsample(output.mask_logits)
        (masks.square().sum() + query_loss + patch_loss).backward()
    assert_close(masks.detach(), small[f"{which}/pred_masks"])
    assert_close(recovery.queries.detach(), small[f"{which}/q"])
    assert_close(recovery.patches.detach(), small[f"{which}/lateral"])
    assert_close(recovery.query_targets, small[f"{which}/ori_q"])
    assert_close(recovery.patch_targets, small[f"{which}/ori_lateral"])
    weight = small_config["rec_w"]
    official = [small[f"{which}/decode.recovery_loss_{side}"] for side in "qk"]
    found = [weight * float(query_loss.detach()), weight * float(patch_loss.detach())]
    np.testing.assert_allclose(found, official, rtol=1e-5)
    unread = ("self_attn.", "norm1.")
    without = {name for name, tensor in model.trainable_parameters() if tensor.grad is None}
    assert without == {
        key for key in small[f"{which}/no_grad_keys"] if not any(part in key for part in unread)
    }


def test_small_trainable_parameters(small, small_model):
    ours = {name for name, _ in small_model.trainable_parameters()}
    unread = {key for key in small["trainable_keys"] if "self_attn." in key or "norm1." in key}
    assert ours == set(small["trainable_keys"]) - unread


def test_small_folded_parts(small, small_model, small_text):
    parts = small_model.fold_for_inference()
    logits = run_parts(parts, torch.from_numpy(small["image"]), small_text.float())
    assert_close(logits, small["low_logits"])


# ---------------------------------------------------------------- real sizes


class RealCase:
    """A reference file at the official size and the model of its rule."""

    def __init__(self, shared_dir, dataset: str) -> None:
        self.golden = load(shared_dir, f"cliprc_real_{dataset}_public.npz")
        config = json.loads(str(self.golden["config_json"]))
        table = json.loads((shared_dir / "specs" / "statedict_cliprc.json").read_text())
        shapes = table[config["config"]]["shapes"]
        skipped = ("text_encoder.", "decode_head.recovery_decoder.")
        shapes = {key: size for key, size in shapes.items() if not key.startswith(skipped)}
        state_dict = tiny.rule_state_dict(shapes, config["salt"], config["gains"])
        self.model = from_official("clip_rc", state_dict, seen_classes=config["seen"], exact=True)
        num_classes = self.golden["low_logits"].shape[1]
        self.text = tiny.text_embeds(num_classes, 512, config["salt"])
        self.image = tiny.image(1, 3, 512, 512, salt=config["salt"])


@pytest.fixture(scope="module", params=["voc", "coco"])
def real(request, shared_dir):
    return RealCase(shared_dir, request.param)


def test_real_scores(real):
    outputs = []
    handle = real.model.register_forward_hook(lambda *call: outputs.append(call[2]))
    scores = real.model.predict(real.image, real.text)
    handle.remove()
    golden = real.golden
    assert np.abs(outputs[0].mask_logits.numpy() - golden["low_logits"]).max() <= REAL_TOLERANCE
    assert_close(outputs[0].cls_embed, golden["cls_feat"])
    assert_close(outputs[0].region_embeds, golden["rlb_feat"])
    if "patch_feat" in golden.files:
        assert_close(outputs[0].patch_embeds, golden["patch_feat"])
    assert_close(scores[:, :, ::8, ::8], golden["pred_sub8"], REAL_TOLERANCE)
    assert np.mean(scores.argmax(1).numpy() == golden["pred_argmax"]) >= MIN_AGREEMENT


def test_real_folded_parts(real):
    logits = run_parts(real.model.fold_for_inference(), real.image, real.text)
    assert np.abs(logits.numpy() - real.golden["low_logits"]).max() <= REAL_TOLERANCE


@pytest.mark.parametrize("real", ["voc"], indirect=True)
def test_real_whole_picture(real):
    golden = real.golden
    rgb = golden["raw_rgb"]
    image = prepare_image(rgb, short_side=512, mean=real.model.image_mean, std=real.model.image_std)
    assert tuple(image.shape) == tuple(golden["pipe_shape"])
    assert_close(image[:, :, ::8, ::8], golden["pipe_sub8"])
    probabilities = slide_predict(real.model, rgb, real.text)
    assert_close(probabilities[None, :, ::5, ::5], golden["slide_softmax_sub5"], REAL_TOLERANCE)
    labels = probabilities.argmax(0).numpy()
    assert np.mean(labels == golden["slide_argmax"]) >= MIN_AGREEMENT


def test_every_official_layout_loads(shared_dir):
    table = json.loads((shared_dir / "specs" / "statedict_cliprc.json").read_text())
    for entry in table.values():
        with torch.device("meta"):
            state_dict = {key: torch.empty(size) for key, size in entry["shapes"].items()}
        model = from_official("clip_rc", state_dict)
        assert isinstance(model, ClipRC)
        assert (model.config.image_size, model.config.image_encoder.num_regions) == (512, 16)
        unread = sum(
            int(np.prod(size))
            for key, size in entry["shapes"].items()
            if key.startswith("decode_head.") and (".self_attn." in key or ".norm1." in key)
        )
        trainable = sum(tensor.numel() for _, tensor in model.trainable_parameters())
        assert trainable == entry["params"]["trainable"] - unread
