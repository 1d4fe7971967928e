"""ZegFormer's matching and losses against their definitions."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from support import tiny, tiny_zegformer
from support.errors import refused
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.zegformer.decoder import Segments
from zsseg_rt.training.data.loading import Batch
from zsseg_rt.training.tasks.zegformer import (
    SegmentWeights,
    ZegFormerTask,
    class_masks,
    match_segments,
    segment_losses,
)

WEIGHTS = SegmentWeights()
NUM_CLASSES = 3


def proposals(num_pictures: int, num_segments: int, size=(4, 5), seed: int = 0) -> Segments:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_pictures, num_segments, NUM_CLASSES + 1))
    masks = rng.normal(scale=3, size=(num_pictures, num_segments, *size))
    return Segments(*(torch.from_numpy(x.astype(np.float32)) for x in (logits, masks)))


def annotations(num_pictures: int, size=(4, 5), seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).choice([0, 1, 2, 255], (num_pictures, *size))
    return torch.from_numpy(values)


def naive_terms(z: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Focal and dice loss of one pair."""
    s = 1 / (1 + np.exp(-z.astype(np.float64)))
    p_t, a_t = np.where(y, s, 1 - s), np.where(y, 0.25, 0.75)
    focal = np.mean(-a_t * (1 - p_t) ** 2 * np.log(p_t))
    return focal, 1 - (2 * np.sum(s * y) + 1) / (np.sum(s) + np.sum(y) + 1)


def naive_cost(logits: np.ndarray, z: np.ndarray, index: int, y: np.ndarray) -> float:
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    focal, dice = naive_terms(z, y)
    return -probability[index] + 20 * focal + dice


@pytest.mark.parametrize("num_segments", [2, 3, 5])
def test_matches_cost_least_of_all_assignments(num_segments):
    segments, labels = proposals(2, num_segments), annotations(2)
    targets = class_masks(labels, NUM_CLASSES)
    for picture, match in enumerate(match_segments(segments, targets, WEIGHTS)):
        logits, masks = (part[picture].numpy() for part in segments)
        target = targets[picture]
        assert target.classes.tolist() == [0, 1, 2]
        costs = np.array(
            [
                [naive_cost(logits[q], masks[q], c, target.masks[c].numpy()) for c in range(3)]
                for q in range(num_segments)
            ]
        )
        pairs = min(num_segments, 3)
        best = min(
            sum(costs[q, c] for q, c in zip(rows, columns, strict=True))
            for rows in permutations(range(num_segments), pairs)
            for columns in permutations(range(3), pairs)
        )
        chosen = costs[match.segments.numpy(), match.targets.numpy()]
        assert len(chosen) == pairs
        assert chosen.sum() == pytest.approx(best, rel=1e-5)


def test_losses_are_their_definitions():
    segments, labels = proposals(3, 4, size=(2, 3)), annotations(3, size=(8, 12))
    labels[1] = 255
    targets = class_masks(labels, NUM_CLASSES)
    matches = match_segments(segments, targets, WEIGHTS)
    focal = dice = entropy = weight = 0.0
    full = torch.nn.functional.interpolate(segments.masks, size=(8, 12), mode="bilinear")
    for picture, (target, match) in enumerate(zip(targets, matches, strict=True)):
        wanted = [NUM_CLASSES] * 4
        for q, g in zip(match.segments.tolist(), match.targets.tolist(), strict=True):
            pair = naive_terms(full[picture, q].numpy(), target.masks[g].numpy())
            focal, dice = focal + pair[0], dice + pair[1]
            wanted[q] = target.classes[g].item()
        log_p = segments.logits[picture].double().log_softmax(dim=-1)
        for q, index in enumerate(wanted):
            share = 0.1 if index == NUM_CLASSES else 1.0
            entropy, weight = entropy - share * log_p[q, index].item(), weight + share
    losses = segment_losses(segments, targets, matches, no_object=0.1)
    expected = (entropy / weight, focal / 6, dice / 6)
    assert [value.item() for value in losses] == pytest.approx(expected, rel=1e-5)


def test_without_any_class_every_segment_should_be_nothing():
    segments = proposals(2, 4)
    parts = [part.requires_grad_(True) for part in segments]
    targets = class_masks(torch.full((2, 4, 5), 255), NUM_CLASSES)
    matches = match_segments(segments, targets, WEIGHTS)
    losses = segment_losses(segments, targets, matches, no_object=0.1)
    assert losses.focal == losses.dice == 0
    expected = -segments.logits.log_softmax(dim=-1)[..., -1].mean()
    torch.testing.assert_close(losses.classification, expected)
    sum(losses).backward()
    assert all(part.grad.isfinite().all() for part in parts)


def test_a_model_that_diverged_gives_losses_that_say_so():
    segments = Segments(*(torch.full_like(part, float("nan")) for part in proposals(1, 4)))
    targets = class_masks(annotations(1), NUM_CLASSES)
    matches = match_segments(segments, targets, WEIGHTS)
    assert all(x.isnan() for x in segment_losses(segments, targets, matches, no_object=0.1))


# ---------------------------------------------------------------- the task


def task(**settings) -> ZegFormerTask:
    model = tiny_zegformer.model(dropout=0.0)
    arguments = {"seen": tiny_zegformer.SEEN} | settings
    return ZegFormerTask(model, tiny_zegformer.text_features(), **arguments).train()


def batch(size=(48, 72)) -> Batch:
    images = torch.stack([tiny_zegformer.picture(*size, salt=salt) for salt in "ab"])
    labels = torch.full((2, *size), 255)
    labels[:, 4:20, 8:40], labels[:, 24:40, 8:60], labels[1, 10:30, 50:70] = 1, 4, 6
    return Batch(images, torch.tensor([size] * 2), labels, ("a", "b"))


@pytest.mark.parametrize("protocol", ["inductive", "supervised"])
def test_losses_fall_and_only_clip_is_frozen(protocol):
    one, given = task(protocol=protocol), batch()
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    optimizer, losses = torch.optim.AdamW(one.parameter_groups()), []
    for _ in range(8):
        total = sum(one(given).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(one.model.parameters(), 0.01)
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.9 * losses[0]
    still = {n for n, p in one.model.named_parameters() if torch.equal(p, before[n])}
    assert {name for name in still if "clip_model" not in name} == {
        "sem_seg_head.predictor.logit_scale"
    }
    assert all(name in still for name in before if "clip_model" in name)


def test_every_layer_has_its_losses():
    terms = task()(batch())
    layers = tiny_zegformer.config().decoder.num_layers
    suffixes = [*(f"_{index}" for index in range(layers - 1)), ""]
    names = [f"{name}{s}" for s in suffixes for name in ("classification", "focal", "dice")]
    assert list(terms) == names


def test_unseen_classes_are_nothing_to_inductive_training():
    one, given = task(), batch()
    labels = given.labels.masked_fill(given.labels == 6, 255)
    assert one(given) == one(replace(given, labels=labels))


def test_padding_is_grey_whatever_its_pixels():
    one, given = task(), replace(batch(), valid_hw=torch.tensor([[48, 50], [40, 72]]))
    images = given.images.clone()
    images[0, :, :, 50:], images[1, :, 40:] = 128, 128
    assert one(given) == one(replace(given, images=images))


def test_rates_and_decay_of_the_groups():
    one = task(learning_rate=1.0, weight_decay=0.5)
    seen = {}
    for group in one.parameter_groups():
        for tensor in group["params"]:
            seen[id(tensor)] = (group["lr"], group["weight_decay"])
    expected = {}
    for name, tensor in one.model.named_parameters():
        if tensor.requires_grad:
            norm = ".norm" in name or "query_embed" in name
            expected[id(tensor)] = (0.1 if name.startswith("backbone.") else 1.0, 0.5 * (not norm))
    assert seen == expected


def test_self_training_is_refused():
    with refused(ArgumentError, "protocol", "'inductive'", "'supervised'"):
        task(protocol="transductive")


def test_the_text_of_another_vocabulary_is_refused():
    model = tiny_zegformer.model()
    with refused(ArgumentError, "seen"):
        ZegFormerTask(model, tiny.text_embeds(3, 48), seen=tiny_zegformer.SEEN)
