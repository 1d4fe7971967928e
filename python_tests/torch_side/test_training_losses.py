"""Losses, labels and tasks: against definitions and the official code, and on tiny models."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from support import tiny, tiny_zegformer
from support.errors import refused
from support.golden import arguments_of, assert_close, config_of, load, state_dict_of
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models import create_model, from_official
from zsseg_rt.models.zegformer.decoder import Segments
from zsseg_rt.networks.zegformer import IMAGE_MEAN, IMAGE_STD
from zsseg_rt.training.data import Batch
from zsseg_rt.training.tasks.descriptor import CosineHeadTask, DescriptorTask
from zsseg_rt.training.tasks.labelled import UNSEEN, LabelProtocol
from zsseg_rt.training.tasks.losses import binary_cross_entropy, cross_entropy, mask_losses
from zsseg_rt.training.tasks.zegformer import (
    SegmentWeights,
    ZegFormerTask,
    class_masks,
    match_segments,
    segment_losses,
)

IGNORED = 255


def some(num_images: int, num_classes: int, size: tuple[int, int], seed: int = 0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(num_images, num_classes, *size)).astype(np.float32)
    labels = rng.integers(-1, num_classes + 2, (num_images, *size))
    labels[labels >= num_classes] = IGNORED
    return torch.from_numpy(logits), torch.from_numpy(labels)


@pytest.mark.parametrize("num_classes", [1, 13])
def test_losses_of_masks_are_those_of_each_class_apart(num_classes):
    """Also where an image has no pixel of a class, and where nothing is labelled."""
    logits, labels = some(3, num_classes, (7, 5))
    labels[2] = IGNORED
    present = focal = dice = 0.0
    for image, annotation in zip(logits.double(), labels, strict=True):
        for index, z in enumerate(image):
            y, p = annotation == index, z.sigmoid()
            p_t, a_t = torch.where(y, p, 1 - p), torch.where(y, 0.25, 0.75)
            focal += (-a_t * (1 - p_t) ** 2 * p_t.log()).mean()
            present += bool(y.any())
            dice += bool(y.any()) * (1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))
    # float32 sums of up to 35 terms against float64
    expected = [(focal / present).item(), (dice / present).item()]
    assert [v.item() for v in mask_losses(logits, labels)] == pytest.approx(expected, rel=1e-5)
    expected = torch.nn.functional.cross_entropy(logits, labels.where(labels >= 0, IGNORED),
                                                 ignore_index=IGNORED)  # fmt: skip
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    targets = (labels.unsqueeze(1) == torch.arange(num_classes).view(1, -1, 1, 1)).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(binary_cross_entropy(logits, labels), expected)


def test_losses_of_certain_logits_stay_finite_and_half_ones_are_compared_in_float32():
    logits = torch.full((1, 2, 3, 3), 1e4)
    logits[:, 1] = -1e4
    logits.requires_grad_(True)
    for label in (0, 1, IGNORED):
        labels = torch.full((1, 3, 3), label)
        focal, dice = mask_losses(logits, labels)
        entropy = cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(focal + dice + entropy, logits)
        assert (focal + dice + entropy).isfinite()
        assert gradient.isfinite().all()
    assert (dice.item(), entropy.item()) == (0, 0)  # of a batch without any class
    assert focal.item() > 0
    logits, labels = some(2, 5, (8, 8))
    half = logits.half()
    for loss in (lambda z, y: mask_losses(z, y)[0], cross_entropy):
        assert loss(half, labels).dtype == torch.float32
        assert loss(half, labels) == loss(half.float(), labels)


def test_segments_without_any_class_should_be_nothing_and_nan_stays_nan():
    segments = Segments(torch.randn(2, 4, 3 + 1), 3 * torch.randn(2, 4, 4, 5))
    parts = [part.requires_grad_(True) for part in segments]
    targets = class_masks(torch.full((2, 4, 5), IGNORED), 3)
    matches = match_segments(segments, targets, SegmentWeights())
    losses = segment_losses(segments, targets, matches, no_object=0.1)
    assert losses["focal"] == losses["dice"] == 0
    expected = -segments.logits.log_softmax(dim=-1)[..., -1].mean()
    torch.testing.assert_close(losses["classification"], expected)
    sum(losses.values()).backward()
    assert all(part.grad.isfinite().all() for part in parts)
    diverged = Segments(*(torch.full_like(part, float("nan")) for part in segments))
    targets = class_masks(torch.arange(40).view(2, 4, 5) % 3, 3)
    matches = match_segments(diverged, targets, SegmentWeights())
    losses = segment_losses(diverged, targets, matches, no_object=0.1)
    assert all(loss.isnan() for loss in losses.values())


SEEN = (0, 2, 5)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("inductive", [0, 2, 5], [0, 255, 1, 255, 255, 2, 255]),
        ("transductive", [0, 1, 2, 3, 4, 5], [0, UNSEEN, 2, UNSEEN, UNSEEN, 5, 255]),
        ("supervised", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 255]),
    ],
)
def test_labels_and_queries(name, rows, expected):
    rule = LabelProtocol(name, num_classes=6, seen=SEEN)
    labels = rule.prepare(torch.tensor([0, 1, 2, 3, 4, 5, 255]))
    assert labels.tolist() == expected
    embeds = torch.randn(6, 4)
    assert torch.equal(rule.select(embeds), embeds[rows])


def test_many_classes_have_another_ignore_label():
    rule = LabelProtocol("inductive", num_classes=300, seen=range(290), ignore_label=65535)
    labels = rule.prepare(torch.tensor([255, 289, 290, 65535]))
    assert labels.tolist() == [255, 289, 65535, 65535]
    for name, seen in (("inductive", ()), ("transductive", range(6))):
        with refused(ArgumentError, "seen"):
            LabelProtocol(name, num_classes=6, seen=seen)


# Sums of at most 86,016 float32 terms in another order; worst seen 1.1e-7.
LOSS_TOLERANCE = 2e-6
# Norms of sums over pixels and pictures; worst seen 1.2e-6. Keys' biases cancel in the softmax:
# what is left of their gradients is rounding.
GRADIENT_TOLERANCE = 1e-5
NO_GRADIENT = 1e-5

PROTOCOLS = {"train_inductive": "inductive", "train_selftrain": "transductive"}
OFFICIAL = {
    "focal": "decode.loss_mask",
    "dice": "decode.loss_dice",
    "recovery_queries": "decode.recovery_loss_q",
    "recovery_patches": "decode.recovery_loss_k",
}
OF_ZEGFORMER = {
    f"{ours}{layer}": f"loss/{name}{layer}"
    for ours, name in (("classification", "loss_ce"), ("focal", "loss_mask"), ("dice", "loss_dice"))
    for layer in ("", "_0")
}


class Step:
    """One training step of a small reference file, up to the gradients."""

    def __init__(self, shared_dir, system: str, run: str) -> None:
        self.system, self.run = system, run
        name = {"clip_rc": "cliprc_small"}.get(system, system + "_small" * (system == "zegclip"))
        self.vectors = load(shared_dir, f"{name}_public.npz")
        make = self.of_zegformer if system == "zegformer" else self.of_descriptor
        self.task, self.images, self.labels = make(config_of(self.vectors))
        self.outputs: list = []
        handle = self.task.model.register_forward_hook(lambda *call: self.outputs.append(call[2]))
        self.terms = self.task.train().losses(self.images, self.labels)
        handle.remove()
        sum(self.terms.values()).backward()
        parameters = self.task.model.named_parameters()
        self.gradients = {name: p.grad for name, p in parameters if p.grad is not None}

    def of_descriptor(self, config):
        arguments = arguments_of(config) | {"prompt_dropout": 0.0, "decoder_dropout": 0.0}
        task = DescriptorTask(
            from_official(self.system, state_dict_of(self.vectors), **arguments),
            torch.from_numpy(self.vectors["text_embeddings"]),
            seen=config["seen"],
            protocol=PROTOCOLS[self.run],
            focal_weight=config["mask_w"],
            dice_weight=config["dice_w"],
            recovery_weight=config["rec_w"],
        )
        image, labels = (torch.from_numpy(self.vectors[f"train_{k}"]) for k in ("image", "gt"))
        return task, image, labels[:, 0]

    def of_zegformer(self, config):
        clip = tiny_zegformer.CLIP
        weights = {k: v for k, v in state_dict_of(self.vectors).items() if not k.startswith(clip)}
        options = {"num_heads": config["heads"], "ensemble": False, "dropout": 0.0}
        model = from_official("zegformer", weights, **options)
        text = torch.from_numpy(self.vectors["text/text_features_test"])
        assert np.array_equal(text[config["seen_indexes"]], self.vectors["text/text_features"])
        image = torch.from_numpy(self.vectors["image0"])
        labels = torch.from_numpy(self.vectors["train/label0"]).long()[None]
        task = ZegFormerTask(model, text, seen=config["seen_indexes"])
        return task, model.prepare([image], IMAGE_MEAN, IMAGE_STD), labels

    def golden(self, key: str) -> np.ndarray:
        return self.vectors[f"{self.run}/{key}"]


DESCRIPTOR_STEPS = [(system, run) for system in ("zegclip", "clip_rc") for run in PROTOCOLS]


@pytest.fixture(scope="module", params=[*DESCRIPTOR_STEPS, ("zegformer", "train")], ids="-".join)
def step(request, shared_dir):
    return Step(shared_dir, *request.param)


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert actual.item() == pytest.approx(float(expected), rel=tolerance, abs=0)


def test_official_losses_and_gradients(step):
    official = OF_ZEGFORMER if step.system == "zegformer" else OFFICIAL
    files = step.vectors.files
    assert step.terms.keys() == {n for n, key in official.items() if f"{step.run}/{key}" in files}
    for name, value in step.terms.items():
        close(value, step.golden(official[name]), LOSS_TOLERANCE)
    close(sum(step.terms.values()), step.golden("loss_total"), LOSS_TOLERANCE)
    prefix = f"{step.run}/gradnorm/"
    norms = {k.removeprefix(prefix): step.vectors[k] for k in step.vectors.files if prefix in k}
    assert norms
    assert step.system == "zegformer" or step.gradients.keys() == norms.keys()
    for name, norm in norms.items():
        if name.endswith("multihead_attn.k.bias") and norm < NO_GRADIENT:
            assert step.gradients[name].norm() < NO_GRADIENT
        else:
            close(step.gradients[name].norm(), norm, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("step", DESCRIPTOR_STEPS, indirect=True, ids="-".join)
def test_descriptor_masks_labels_and_parameters(step):
    logits = step.task.model.upsample(step.outputs[0].mask_logits).detach()
    assert_close(logits, step.golden("pred_masks"))
    protocol = step.task.label_protocol
    labels = protocol.complete(protocol.prepare(step.labels), logits.sigmoid())
    assert np.array_equal(labels[:, None].numpy(), step.golden("label_used"))
    labelled = labels != protocol.ignore_label
    accuracy = (logits.argmax(dim=1) == labels)[labelled].float().mean()
    close(100 * accuracy, step.golden("decode.acc_seg")[0], 1e-6)
    trained = {name: p for name, p in step.task.model.named_parameters() if p.requires_grad}
    assert trained.keys() == set(step.vectors["trainable_keys"]) - set(step.golden("no_grad_keys"))
    assert step.gradients.keys() == trained.keys()
    (group,) = step.task.parameter_groups()
    assert (group["lr"], group["weight_decay"]) == (2e-4, 0.01)
    assert set(map(id, group["params"])) == set(map(id, trained.values()))
    recovery = step.outputs[0].recovery
    assert (recovery is not None) == (step.system == "clip_rc")
    if recovery is not None:
        assert_close(recovery.queries.detach(), step.golden("q"))
        assert_close(recovery.patches.detach(), step.golden("lateral"))
        assert_close(recovery.query_targets, step.golden("ori_q"))
        assert_close(recovery.patch_targets, step.golden("ori_lateral"))
        assert not recovery.query_targets.requires_grad
        assert not recovery.patch_targets.requires_grad


@pytest.mark.parametrize("step", [("zegformer", "train")], indirect=True, ids="-".join)
def test_zegformer_matches_and_saves_the_official_keys(step):
    targets = class_masks(torch.nn.functional.pad(step.labels, (0, 8), value=255), 5)
    layers = step.task.segments(step.images)
    for index, layer in enumerate([layers[-1], *layers[:-1]]):
        (match,) = match_segments(layer, targets, SegmentWeights())
        assert np.array_equal(torch.stack(match), step.golden(f"match{index}/0"))
    official = set(step.golden("train_only_keys")) - {"criterion.empty_weight"}
    assert set(step.task.model.state_dict()) == official


# --- tasks on tiny models: what they train, what they look at, and that losses fall ---


SIZES = tiny.TinySizes(num_layers=2, text_layers=1)
UNSEEN_OF = {"zegclip": (2, 5), "clip_rc": (2, 5), "cosine_head": (2, 5), "zegformer": (6,)}
DESCRIPTORS = {"zegclip": tiny.zegclip_model, "clip_rc": tiny.clip_rc_model}


@pytest.fixture
def task(clip_file):
    def build(system="zegclip", **settings):
        settings = {"seen": SIZES.seen} | settings
        text = tiny.text_embeds(SIZES.num_classes, SIZES.embed_dim)
        if system == "zegformer":
            model, text = tiny_zegformer.model(dropout=0.0), tiny_zegformer.text_features()
            settings["seen"] = tiny_zegformer.SEEN
            return ZegFormerTask(model, text, **settings).train()
        if system in DESCRIPTORS:
            model = DESCRIPTORS[system](SIZES, prompt_dropout=0.0, decoder_dropout=0.0)
            return DescriptorTask(model, text, **settings).train()
        options = {"activation": "quick_gelu", "image_size": 64}
        model = create_model("cosine_head", pretrained=clip_file, **options)
        return CosineHeadTask(model, text, **settings).train()

    return build


def batch(system="zegclip", num_images=2):
    """Images whose halves are two classes, with a frame that is not annotated."""
    size = (48, 72) if system == "zegformer" else (64, 64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, *size), generator=generator)
    labels = torch.full((num_images, *size), 255)
    for index, rows in enumerate(labels):
        rows[4:-4, 4 : size[1] // 2] = index % 7
        rows[4:-4, size[1] // 2 : -4] = (index + 2) % 7
    names = tuple(f"image {index}" for index in range(num_images))
    return Batch(images.to(torch.uint8), torch.tensor([size] * num_images), labels, names)


def test_the_loss_of_the_cosine_head_falls(task):
    """Of the others, gradients are compared with the official ones."""
    one, data, losses = task("cosine_head", learning_rate=1e-3), batch(), []
    optimizer = torch.optim.AdamW(one.parameter_groups())
    for _ in range(12):
        losses.append(one(data)["cross_entropy"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("system", UNSEEN_OF)
def test_inductive_training_cannot_tell_unseen_classes_from_nothing(task, system):
    one, data = task(system), batch(system, num_images=5)
    labels = data.labels.clone()
    labels[torch.isin(labels, torch.tensor(UNSEEN_OF[system]))] = 255
    assert (labels != data.labels).any()
    assert one(data) == one(replace(data, labels=labels))


def test_transductive_training_cannot_tell_unseen_classes_apart(task):
    one, data = task(protocol="transductive"), batch(num_images=4)
    labels = data.labels.where(data.labels != 2, 5)
    assert (labels != data.labels).any()
    assert one(data) == one(replace(data, labels=labels))
    labels[labels == 5] = 255
    assert one(data)["focal"] != one(replace(data, labels=labels))["focal"]


def test_a_stride_looks_at_every_so_many_th_label(task):
    data, images = batch(), torch.zeros(2, 3, 64, 64)
    with torch.no_grad():
        expected = task().losses(images, data.labels[:, 2::4, 2::4])
        losses = task(label_stride=4).losses(images, data.labels)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("system", ["zegclip", "zegformer"])
def test_padding_is_the_mean_colour_whatever_its_pixels(task, system):
    one, data = task(system), batch(system)
    images = data.images.clone()
    images[0, :, :, 40:], images[1, :, 33:] = 0, 255
    data = replace(data, valid_hw=torch.tensor([[images.shape[2], 40], [33, images.shape[3]]]))
    assert one(data) == one(replace(data, images=images))


def test_rates_and_decay_of_the_groups(task):
    def rates(one):
        names = {id(p): name for name, p in one.model.named_parameters()}
        groups = one.parameter_groups()
        return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    one = task("zegformer", learning_rate=1.0, weight_decay=0.5)
    assert rates(one) == {
        name: (
            0.1 if name.startswith("backbone.") else 1.0,
            0.0 if ".norm" in name or "query_embed" in name else 0.5,
        )
        for name, tensor in one.model.named_parameters()
        if tensor.requires_grad
    }
    one = task("cosine_head", learning_rate=3.0, backbone_learning_rate=2.0, weight_decay=0.5)
    head = {"image_encoder.head.weight": (3.0, 0.5), "log_scale": (3.0, 0.0)}
    tower = (name for name, _ in one.model.named_parameters() if name.startswith("image_encoder."))
    assert rates(one) == dict.fromkeys(tower, (2.0, 0.5)) | head
    one = task("cosine_head", learning_rate=3.0, backbone_learning_rate=0.0, weight_decay=0.5)
    assert rates(one) == head


def test_settings_out_of_range_are_refused(task):
    for system, settings in (
        ("zegclip", {"focal_weight": -1.0}),
        ("zegclip", {"learning_rate": float("nan")}),
        ("zegclip", {"label_stride": 0}),
        ("zegformer", {"protocol": "transductive"}),
    ):
        with refused(ArgumentError, *settings):
            task(system, **settings)
