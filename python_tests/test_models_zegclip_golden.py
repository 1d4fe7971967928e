"""ZegCLIP against the official code's outputs."""

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
from zsseg_rt.models.clip import ClipWeights, build_text_encoder
from zsseg_rt.models.mask_decoder import DecoderLayer
from zsseg_rt.models.sliding import prepare_image, slide_scores
from zsseg_rt.models.text_encoder import average_templates
from zsseg_rt.models.zegclip import ZegCLIP

pytestmark = pytest.mark.needs_shared


@pytest.fixture(scope="module", autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---------------------------------------------------------------- small, every intermediate


@pytest.fixture(scope="module")
def small(shared_dir):
    return load(shared_dir, "zegclip_small_public.npz")


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
    return from_official("zegclip", small_state_dict, **small_arguments)


@pytest.fixture(scope="module")
def small_text(small):
    return torch.from_numpy(small["text_embeddings"])


@pytest.fixture(scope="module")
def small_output(small, small_model, small_text):
    """The output, with what every submodule of the image tower was given and gave."""
    image = torch.from_numpy(small["image"])
    return record(small_model.backbone, lambda: small_model(image, small_text))


def test_the_tiny_builder_follows_the_reference_rule(small_state_dict):
    built = tiny.zegclip_state_dict()
    assert built.keys() == small_state_dict.keys()
    assert all(torch.equal(built[key], value) for key, value in small_state_dict.items())


def test_small_output(small, small_output):
    output, _ = small_output
    assert_close(output.mask_logits, small["low_logits"])
    assert_close(output.patch_embeds, small["patch_feat"])
    assert_close(output.cls_embed, small["cls_feat"])


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("stage", ["ln_pre", "block0", "block1", "block2", "block3", "ln_post"])
def test_small_image_encoder(small, small_output, stage, side):
    _, seen = small_output
    module = stage.replace("block", "transformer.resblocks.")
    assert_close(seen[module][side == "out"], small[f"{stage}_{side}"])


def test_small_prompt_norm(small, small_output):
    assert_close(small_output[1]["prompt_norm"][1], small["prompt_norm_out"])


def test_small_relationship_descriptor(small, small_model, small_text):
    cls_embed, text = torch.from_numpy(small["cls_feat"]), small_text.float()
    projection = small_model.decode_head.q_proj
    assert_close(functional.describe(cls_embed, text), small["q_proj_in"])
    queries = functional.relationship_descriptor(
        cls_embed, text, projection.weight, projection.bias
    )
    assert_close(queries, small["q_proj_out"])


def test_small_decoder_layers(small, small_model):
    memory = torch.from_numpy(small["patch_feat"]).flatten(2).transpose(1, 2)
    queries = torch.from_numpy(small["q_proj_out"])
    for index, layer in enumerate(small_model.decode_head.decoder_1.layers):
        assert isinstance(layer, DecoderLayer)
        masks = layer.multihead_attn.mask_logits(queries, memory)
        queries = layer(queries, memory)
        assert_close(masks.unflatten(2, (4, 4)), small[f"dec{index}_mask"])
        assert_close(queries, small[f"dec{index}_q"])


def test_small_scores(small, small_model, small_text):
    image = torch.from_numpy(small["image"])
    low_logits = small_model(image, small_text).mask_logits
    scores = small_model.predict(image, small_text)
    assert_close(small_model.upsample(low_logits), small["mask_logits_up"])
    assert_close(scores, small["pred"])
    assert np.mean(scores.argmax(1).numpy() == small["pred_argmax"]) >= MIN_AGREEMENT


def test_small_scores_after_self_training(small, small_state_dict, small_arguments, small_text):
    model = from_official("zegclip", small_state_dict, **small_arguments, self_trained=True)
    scores = model.predict(torch.from_numpy(small["image"]), small_text)
    assert_close(scores, small["pred_self_training"])


def test_small_other_image_size(small, small_model, small_text):
    image = torch.from_numpy(small["alt_image"])
    low_logits = small_model(image, small_text).mask_logits
    assert_close(low_logits.flatten(2), small["alt_low_attn"])
    assert_close(small_model.upsample(low_logits), small["alt_mask_logits_up"])
    assert_close(small_model.predict(image, small_text), small["alt_pred"])


def test_small_whole_picture(small, small_config, small_model, small_text):
    rgb, crop, stride = small["raw_rgb"], small_config["crop"], small_config["stride"]
    image = prepare_image(
        rgb, short_side=crop, mean=small_model.image_mean, std=small_model.image_std
    )
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
    embeds = small_model.text_encoder(torch.from_numpy(small["text_tokens"]))
    assert_close(embeds, small["text_encoder_out"])
    assert_close(average_templates(embeds[:, None]), small["text_encoder_out_normed"])


@pytest.mark.parametrize("which", ["train_inductive", "train_selftrain"])
def test_small_training_masks_and_gradients(
    small, small_config, small_state_dict, small_arguments, small_text, which
):
    model = from_official(
        "zegclip", small_state_dict, **small_arguments, prompt_dropout=0.0, decoder_dropout=0.0
    ).train()
    text = small_text[small_config["seen"]] if which == "train_inductive" else small_text
    with torch.enable_grad():
        logits = model.upsample(model(torch.from_numpy(small["train_image"]), text).mask_logits)
        logits.square().sum().backward()
    assert_close(logits.detach(), small[f"{which}/pred_masks"])
    unread = ("self_attn.", "norm1.")
    without = {name for name, tensor in model.trainable_parameters() if tensor.grad is None}
    official = {key for key in small[f"{which}/no_grad_keys"] if not any(u in key for u in unread)}
    assert without == official


def test_small_trainable_parameters(small, small_model):
    ours = {name for name, _ in small_model.trainable_parameters()}
    unread = {key for key in small["trainable_keys"] if "self_attn." in key or "norm1." in key}
    assert ours == set(small["trainable_keys"]) - unread


def test_small_folded_parts(small, small_model, small_text):
    parts = small_model.fold_for_inference()
    patch_embeds, cls_embed = parts.image_encoder(torch.from_numpy(small["image"]))
    assert_close(cls_embed, small["cls_feat"])
    queries = functional.relationship_descriptor(
        cls_embed, small_text.float(), parts.descriptor_weight, parts.descriptor_bias
    )
    class_embeds, patch_keys = parts.decoder(queries, patch_embeds)
    logits = functional.patch_text_similarity(
        patch_keys, class_embeds, logit_scale=parts.logit_scale, normalize=False
    )
    assert_close(logits.unflatten(2, parts.grid_hw), small["low_logits"])


# ---------------------------------------------------------------- real sizes


class RealCase:
    """A reference file at the official size and the model of its rule."""

    def __init__(self, shared_dir, dataset: str) -> None:
        self.golden = load(shared_dir, f"zegclip_real_{dataset}_public.npz")
        config = json.loads(str(self.golden["config_json"]))
        table = json.loads((shared_dir / "specs" / "statedict_zegclip.json").read_text())
        shapes = table[config["config"]]["shapes"]
        shapes = {key: size for key, size in shapes.items() if not key.startswith("text_encoder.")}
        state_dict = tiny.rule_state_dict(shapes, config["salt"], config["gains"])
        self.model = from_official("zegclip", state_dict, seen_classes=config["seen"])
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
    if "patch_feat" in golden.files:
        assert_close(outputs[0].patch_embeds, golden["patch_feat"])
    assert_close(scores[:, :, ::8, ::8], golden["pred_sub8"], REAL_TOLERANCE)
    assert np.mean(scores.argmax(1).numpy() == golden["pred_argmax"]) >= MIN_AGREEMENT


def test_real_folded_parts(real):
    parts = real.model.fold_for_inference()
    patch_embeds, cls_embed = parts.image_encoder(real.image)
    queries = functional.relationship_descriptor(
        cls_embed, real.text, parts.descriptor_weight, parts.descriptor_bias
    )
    class_embeds, patch_keys = parts.decoder(queries, patch_embeds)
    logits = functional.patch_text_similarity(
        patch_keys, class_embeds, logit_scale=parts.logit_scale, normalize=False
    ).unflatten(2, parts.grid_hw)
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


def test_real_text_encoder_and_tokens(shared_dir):
    golden, tokens = (
        load(shared_dir, name) for name in ("zegclip_text_real_public.npz", "zs_tokens_public.npz")
    )
    table = json.loads((shared_dir / "specs" / "statedict_zegclip.json").read_text())
    shapes = next(iter(table.values()))["shapes"]
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


@pytest.mark.parametrize("official", range(7))
def test_every_official_layout_loads(shared_dir, official):
    table = json.loads((shared_dir / "specs" / "statedict_zegclip.json").read_text())
    entry = list(table.values())[official]
    with torch.device("meta"):
        state_dict = {key: torch.empty(size) for key, size in entry["shapes"].items()}
    model = from_official("zegclip", state_dict)
    assert isinstance(model, ZegCLIP)
    assert model.config.image_size == 512
    unread = sum(
        int(np.prod(size))
        for key, size in entry["shapes"].items()
        if "decoder_1" in key and (".self_attn." in key or ".norm1." in key)
    )
    trainable = sum(tensor.numel() for _, tensor in model.trainable_parameters())
    assert trainable == entry["params"]["trainable"] - unread
