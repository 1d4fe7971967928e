"""ZegCLIP and CLIP-RC against their official codes' outputs, by torch, NumPy and OpenVINO."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from support import tiny
from support.descriptor_models import run_parts
from support.golden import MIN_AGREEMENT, REAL_TOLERANCE, assert_close, load
from support.golden_descriptor import RealCase, SmallCase, official_layouts, unread
from zsseg_rt.export import export_graphs
from zsseg_rt.models import from_official, functional, slide_predict
from zsseg_rt.models.base import prepare_image, slide_scores
from zsseg_rt.models.clip.towers import average_templates
from zsseg_rt.models.clip.weights import build_text_encoder
from zsseg_rt.models.descriptor.clip_rc import attention_allowed
from zsseg_rt.torch_files.clip_weights import ClipWeights

pytestmark = [pytest.mark.needs_shared, pytest.mark.usefixtures("without_gradients")]

ARCHITECTURES = ("zegclip", "clip_rc")
STATE_DICTS = {"zegclip": tiny.zegclip_state_dict, "clip_rc": tiny.clip_rc_state_dict}
ENCODER = ("ln_pre", "block0", "block1", "block2", "block3", "ln_post")


# ---------------------------------------------------------------- small, every intermediate


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small(request, shared_dir):
    return SmallCase(shared_dir, request.param)


def test_the_tiny_builder_follows_the_reference_rule(small):
    built = STATE_DICTS[small.architecture]()
    assert built.keys() == small.state_dict.keys()
    assert all(torch.equal(built[key], value) for key, value in small.state_dict.items())


def stages_of(architecture):
    """Where each reference stage is seen: submodule, and whether it is what that was given."""
    stages = {
        f"{stage}_{side}": ("backbone." + stage.replace("block", "transformer.resblocks."), side)
        for stage in ENCODER
        for side in ("in", "out")
    }
    stages["prompt_norm_out"] = ("backbone.prompt_norm", "out")
    head = "decode_head."
    if architecture == "zegclip":
        return stages | {f"dec{i}_q": (f"{head}decoder_1.layers.{i}", "out") for i in range(2)}
    for name in ("q_proj", "lateral_proj"):
        stages |= {f"{name}_{side}": (head + name, side) for side in ("in", "out")}
    for i in range(3):
        stages[f"dec{i}_q"] = (f"{head}decoder_q.layers.{i}", "out")
        stages[f"dec{i}_lateral"] = (f"{head}decoder_v.layers.{i}", "out")
    return stages


def test_small_stages(small):
    golden, (output, seen) = small.golden, small.output
    for key, (module, side) in stages_of(small.architecture).items():
        assert_close(seen[module][side == "out"], golden[key])
    assert_close(output.mask_logits, golden["low_logits"])
    assert_close(output.patch_embeds, golden["patch_feat"])
    assert_close(output.cls_embed, golden["cls_feat"])


def test_small_masks_of_each_part(small):
    golden, head = small.golden, small.model.decode_head
    if small.architecture == "clip_rc":
        output, seen = small.output
        assert_close(output.cell_embeds, golden["rlb_feat"])
        assert output.recovery is None
        allowed = attention_allowed((4, 4), small.config["rlb"], small.config["ntok"])
        assert np.array_equal(allowed.numpy(), golden["attn_allowed"] != 0)
        queries, patches = (seen[f"decode_head.decoder_{x}.layers.2"][1] for x in "qv")
        raw = functional.patch_text_similarity(patches, queries, normalize=False)
        assert_close(raw.unflatten(2, (4, 4)), golden["attn_raw"])
        return
    cls_embed, project = torch.from_numpy(golden["cls_feat"]), head.q_proj
    text = small.text.float()
    assert_close(functional.describe(cls_embed, text), golden["q_proj_in"])
    queries = functional.relationship_descriptor(cls_embed, text, project.weight, project.bias)
    assert_close(queries, golden["q_proj_out"])
    memory = torch.from_numpy(golden["patch_feat"]).flatten(2).transpose(1, 2)
    for index, layer in enumerate(head.decoder_1.layers):
        masks = layer.multihead_attn.mask_logits(queries, memory)
        assert_close(masks.unflatten(2, (4, 4)), golden[f"dec{index}_mask"])
        queries = layer(queries, memory)
        assert_close(queries, golden[f"dec{index}_q"])


def test_small_scores(small):
    low_logits = small.model(small.image, small.text).mask_logits
    scores = small.model.predict(small.image, small.text)
    assert_close(small.model.upsample(low_logits), small.golden["mask_logits_up"])
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


@pytest.mark.parametrize("which", ["train_inductive", "train_selftrain"])
def test_small_training(small, which):
    """Masks, what CLIP-RC recovers, and which tensors learn."""
    model = small.build(prompt_dropout=0.0, decoder_dropout=0.0).train()
    golden = {
        key.removeprefix(f"{which}/"): small.golden[key]
        for key in small.golden.files
        if key.startswith(f"{which}/")
    }
    text = small.text[small.config["seen"]] if which == "train_inductive" else small.text
    with torch.enable_grad():
        output = model(torch.from_numpy(small.golden["train_image"]), text)
        masks = model.upsample(output.mask_logits)
        loss = masks.square().sum()
        recovery = getattr(output, "recovery", None)
        if recovery is not None:
            query_loss = (recovery.queries - recovery.query_targets).abs().mean()
            patch_loss = (recovery.patches - recovery.patch_targets).abs().mean()
            loss = loss + query_loss + patch_loss
        loss.backward()
    assert_close(masks.detach(), golden["pred_masks"])
    assert (recovery is not None) == (small.architecture == "clip_rc")
    if recovery is not None:
        assert_close(recovery.queries.detach(), golden["q"])
        assert_close(recovery.patches.detach(), golden["lateral"])
        assert_close(recovery.query_targets, golden["ori_q"])
        assert_close(recovery.patch_targets, golden["ori_lateral"])
        official = [golden[f"decode.recovery_loss_{side}"] for side in "qk"]
        losses = [small.config["rec_w"] * float(loss.detach()) for loss in (query_loss, patch_loss)]
        np.testing.assert_allclose(losses, official, rtol=1e-5)
    trainable = dict(model.trainable_parameters())
    assert trainable.keys() == {key for key in small.golden["trainable_keys"] if not unread(key)}
    without = {name for name, tensor in trainable.items() if tensor.grad is None}
    assert without == {key for key in golden["no_grad_keys"] if not unread(key)}


# ---------------------------------------------------------------- real sizes


# COCO's models differ from VOC's in the number of prompts and of classes alone.
DATASETS = {"voc": (), "coco": pytest.mark.nightly}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((a, d), marks=marks, id=f"{a}-{d}")
        for a in ARCHITECTURES
        for d, marks in DATASETS.items()
    ],
)
def real(request, shared_dir):
    return RealCase(shared_dir, *request.param)


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


@pytest.mark.parametrize("real", [(a, "voc") for a in ARCHITECTURES], indirect=True, ids="-".join)
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
        trainable = sum(tensor.numel() for _, tensor in model.trainable_parameters())
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
    encoder = build_text_encoder(ClipWeights(visual={}, text=weights, activation="quick_gelu"))
    voc = encoder(torch.from_numpy(tokens["voc_single"].astype(np.int64)))
    assert_close(voc, golden["voc_single_raw"])
    assert_close(average_templates(voc[:, None]), golden["voc_single_normed"])
    multi = encoder(torch.from_numpy(tokens["coco_multi"][7].astype(np.int64)))
    assert_close(average_templates(multi), golden["coco_class7_multi"])


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
