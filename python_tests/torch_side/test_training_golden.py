"""Training against the official code: losses, labels, masks, gradients, the learning rate."""

import numpy as np
import pytest
import torch

from support import tiny_zegformer
from support.golden import arguments_of, assert_close, config_of, load, state_dict_of
from zsseg_rt.models import from_official
from zsseg_rt.networks.zegformer import IMAGE_MEAN, IMAGE_STD
from zsseg_rt.training.tasks.descriptor import DescriptorTask
from zsseg_rt.training.tasks.zegformer import (
    SegmentWeights,
    ZegFormerTask,
    class_masks,
    match_segments,
)

pytestmark = pytest.mark.needs_shared

# Sums of at most 86,016 float32 terms in another order; worst seen 1.1e-7.
LOSS_TOLERANCE = 2e-6
# Norms of sums over pixels and pictures; worst seen 1.2e-6. Keys' biases cancel in the softmax:
# what is left of their gradients is rounding.
GRADIENT_TOLERANCE = 1e-5
NO_GRADIENT = 1e-5

PROTOCOLS = {"train_inductive": "inductive", "train_selftrain": "transductive"}


class Descriptor:
    """One training step of a small reference file, up to the gradients."""

    def __init__(self, shared_dir, system: str, run: str) -> None:
        name = {"zegclip": "zegclip", "clip_rc": "cliprc"}[system]
        self.vectors, self.run = load(shared_dir, f"{name}_small_public.npz"), run
        config = config_of(self.vectors)
        arguments = arguments_of(config) | {"prompt_dropout": 0.0, "decoder_dropout": 0.0}
        model = from_official(system, state_dict_of(self.vectors), **arguments)
        self.task = DescriptorTask(
            model,
            torch.from_numpy(self.vectors["text_embeddings"]),
            seen=config["seen"],
            protocol=PROTOCOLS[run],
            focal_weight=config["mask_w"],
            dice_weight=config["dice_w"],
            recovery_weight=config["rec_w"],
        ).train()
        self.labels = torch.from_numpy(self.vectors["train_gt"])[:, 0]
        self.outputs: list = []
        handle = model.register_forward_hook(lambda *call: self.outputs.append(call[2]))
        image = torch.from_numpy(self.vectors["train_image"])
        self.terms = self.task.losses(image, self.labels)
        handle.remove()
        sum(self.terms.values()).backward()

    def golden(self, key: str) -> np.ndarray:
        return self.vectors[f"{self.run}/{key}"]

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        parameters = self.task.model.named_parameters()
        return {name: p.grad for name, p in parameters if p.grad is not None}


@pytest.fixture(scope="module", params=[(s, r) for s in ("zegclip", "clip_rc") for r in PROTOCOLS])
def step(request, shared_dir):
    return Descriptor(shared_dir, *request.param)


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert actual.item() == pytest.approx(float(expected), rel=tolerance, abs=0)


def test_descriptor_losses(step):
    official = {
        "focal": "decode.loss_mask",
        "dice": "decode.loss_dice",
        "recovery_queries": "decode.recovery_loss_q",
        "recovery_patches": "decode.recovery_loss_k",
    }
    names = {name for name, key in official.items() if f"{step.run}/{key}" in step.vectors.files}
    assert step.terms.keys() == names
    for name, value in step.terms.items():
        close(value, step.golden(official[name]), LOSS_TOLERANCE)
    close(sum(step.terms.values()), step.golden("loss_total"), LOSS_TOLERANCE)


def test_descriptor_masks_and_labels(step):
    logits = step.task.model.upsample(step.outputs[0].mask_logits).detach()
    assert_close(logits, step.golden("pred_masks"))
    protocol = step.task.label_protocol
    labels = protocol.complete(protocol.prepare(step.labels), logits.sigmoid())
    assert np.array_equal(labels[:, None].numpy(), step.golden("label_used"))
    labelled = labels != protocol.ignore_label
    accuracy = (logits.argmax(dim=1) == labels)[labelled].float().mean()
    close(100 * accuracy, step.golden("decode.acc_seg")[0], 1e-6)


def test_descriptor_gradients(step):
    prefix = f"{step.run}/gradnorm/"
    norms = {k.removeprefix(prefix): step.vectors[k] for k in step.vectors.files if prefix in k}
    assert step.gradients.keys() == norms.keys()
    for name, gradient in step.gradients.items():
        if name.endswith("multihead_attn.k.bias") and norms[name] < NO_GRADIENT:
            assert gradient.norm() < NO_GRADIENT
        else:
            close(gradient.norm(), norms[name], GRADIENT_TOLERANCE)


def test_descriptor_trains_what_gets_gradients(step):
    unread = set(step.golden("no_grad_keys"))
    ours = {name for name, p in step.task.model.named_parameters() if p.requires_grad}
    assert ours == set(step.vectors["trainable_keys"]) - unread
    assert step.gradients.keys() == ours
    (group,) = step.task.parameter_groups()
    assert (group["lr"], group["weight_decay"]) == (2e-4, 0.01)
    assert {id(p) for p in group["params"]} == {
        id(p) for p in step.task.model.parameters() if p.requires_grad
    }


@pytest.mark.parametrize("step", [("clip_rc", run) for run in PROTOCOLS], indirect=True)
@pytest.mark.parametrize("what", ["queries", "patches"])
def test_recovery(step, what):
    recovery = step.outputs[0].recovery
    key = {"queries": "q", "patches": "lateral"}[what]
    assert_close(getattr(recovery, what).detach(), step.golden(key))
    targets = getattr(recovery, {"queries": "query_targets", "patches": "patch_targets"}[what])
    assert_close(targets, step.golden(f"ori_{key}"))
    assert not targets.requires_grad


# ---------------------------------------------------------------- ZegFormer


class Proposals:
    """One training step of ZegFormer's small reference file, up to the gradients."""

    def __init__(self, shared_dir) -> None:
        self.vectors = load(shared_dir, "zegformer_public.npz")
        config = config_of(self.vectors)
        state_dict = {
            key: value
            for key, value in state_dict_of(self.vectors).items()
            if not key.startswith(tiny_zegformer.CLIP)
        }
        seen = config["seen_indexes"]
        model = from_official(
            "zegformer", state_dict, num_heads=config["heads"], ensemble=False, dropout=0.0
        )
        text = torch.from_numpy(self.vectors["text/text_features_test"])
        assert np.array_equal(text[seen], self.vectors["text/text_features"])
        self.task = ZegFormerTask(model, text, seen=seen).train()
        images = [torch.from_numpy(self.vectors["image0"])]
        self.images = model.prepare(images, IMAGE_MEAN, IMAGE_STD)
        self.labels = torch.from_numpy(self.vectors["train/label0"]).long()[None]
        self.terms = self.task.losses(self.images, self.labels)
        sum(self.terms.values()).backward()


@pytest.fixture(scope="module")
def proposals(shared_dir):
    return Proposals(shared_dir)


def test_zegformer_losses(proposals):
    names = {"classification": "loss_ce", "focal": "loss_mask", "dice": "loss_dice"}
    assert len(proposals.terms) == 6
    for name, value in proposals.terms.items():
        key, _, suffix = name.partition("_")
        official = names[key] + (f"_{suffix}" if suffix else "")
        close(value, proposals.vectors[f"train/loss/{official}"], LOSS_TOLERANCE)
    total = sum(proposals.terms.values())
    close(total, proposals.vectors["train/loss_total"], LOSS_TOLERANCE)


def test_zegformer_matches(proposals):
    labels = torch.nn.functional.pad(proposals.labels, (0, 8), value=255)
    targets = class_masks(labels, 5)
    layers = proposals.task.segments(proposals.images)
    for index, layer in enumerate([layers[-1], *layers[:-1]]):
        (match,) = match_segments(layer, targets, SegmentWeights())
        assert np.array_equal(torch.stack(match), proposals.vectors[f"train/match{index}/0"])


def test_zegformer_gradients(proposals):
    gradients = {name: p.grad for name, p in proposals.task.model.named_parameters()}
    prefix = "train/gradnorm/"
    keys = [key for key in proposals.vectors.files if key.startswith(prefix)]
    assert keys
    for key in keys:
        norm = gradients[key.removeprefix(prefix)].norm()
        close(norm, proposals.vectors[key], GRADIENT_TOLERANCE)


def test_zegformer_training_checkpoints_have_the_official_keys(proposals):
    official = set(proposals.vectors["train/train_only_keys"])
    assert set(proposals.task.model.state_dict()) == official - {"criterion.empty_weight"}
