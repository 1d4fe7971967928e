"""The torch kernels against the NumPy definitions."""

import numpy as np
import pytest
import torch

from zsseg_rt.models import functional
from zsseg_rt.ops import reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_equal(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize("size_hw", [(1, 1), (7, 13), (64, 48), (37, 101)])
def test_preprocess(size_hw, channel_order):
    frame = pixels(37, 53, 3)
    arguments = {"size_hw": size_hw, "mean": MEAN, "std": STD, "channel_order": channel_order}
    actual = functional.preprocess(torch.from_numpy(frame), **arguments)
    # torch computes source coordinates in float32.
    assert_equal(actual, reference.preprocess(frame, **arguments), atol=5e-5)


@pytest.mark.parametrize(("batch", "classes", "dim", "out"), [(1, 1, 1, 1), (2, 7, 31, 13)])
def test_relationship_descriptor(batch, classes, dim, out):
    arrays = normal(batch, dim), normal(classes, dim, seed=1), normal(out, 2 * dim), normal(out)
    actual = functional.relationship_descriptor(*map(torch.from_numpy, arrays))
    assert_equal(actual, reference.relationship_descriptor(*arrays))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("text_shape", [(7, 31), (2, 7, 31), (1, 31)])
def test_patch_text_similarity(text_shape, normalize):
    patches, text = normal(2, 13, 31), normal(*text_shape, seed=1)
    arguments = {"logit_scale": 2.5, "normalize": normalize}
    actual = functional.patch_text_similarity(
        torch.from_numpy(patches), torch.from_numpy(text), **arguments
    )
    assert_equal(actual, reference.patch_text_similarity(patches, text, **arguments), atol=5e-5)


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
@pytest.mark.parametrize("seen_bias", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "out_hw"), [((1, 1, 1, 1), (3, 5)), ((2, 7, 5, 4), (33, 61)), ((1, 3, 9, 9), (4, 4))]
)
def test_upsample_argmax(shape, out_hw, seen_bias, activation):
    logits = normal(*shape)
    seen = np.arange(shape[1]) % 2 == 0
    arguments = {"activation": activation, "seen_bias": seen_bias, "with_scores": True}
    labels, scores = functional.upsample_argmax(
        torch.from_numpy(logits), out_hw, seen=torch.from_numpy(seen), **arguments
    )
    expected_labels, expected_scores = reference.upsample_argmax(
        logits, out_hw, seen=seen, **arguments
    )
    agree = labels.numpy() == expected_labels
    assert agree.mean() >= 0.999
    np.testing.assert_allclose(scores.numpy()[agree], expected_scores[agree], rtol=0, atol=1e-5)


def test_upsample_argmax_marks_unknown_pixels():
    logits = normal(1, 5, 8, 8)
    arguments = {"activation": "sigmoid", "unknown_below": 0.75}
    labels, scores = functional.upsample_argmax(torch.from_numpy(logits), (50, 50), **arguments)
    expected, _ = reference.upsample_argmax(logits, (50, 50), **arguments)
    assert scores is None
    assert 0.05 < (labels == 255).float().mean() < 0.95
    assert np.mean(labels.numpy() == expected) >= 0.999


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_upsample_argmax_never_picks_masked_classes(activation):
    logits = normal(1, 4, 5, 5) - 20
    logits[:, 2] = -np.inf
    labels, _ = functional.upsample_argmax(
        torch.from_numpy(logits), (23, 31), activation=activation
    )
    expected, _ = reference.upsample_argmax(logits, (23, 31), activation=activation)
    assert set(labels.unique().tolist()) <= {0, 1, 3}
    assert np.mean(labels.numpy() == expected) >= 0.999


def test_upsample_argmax_above_254_classes():
    logits = normal(1, 300, 2, 2)
    labels, _ = functional.upsample_argmax(
        torch.from_numpy(logits), (6, 6), activation="sigmoid", unknown_below=2.0
    )
    expected, _ = reference.upsample_argmax(logits, (6, 6), activation="sigmoid", unknown_below=2.0)
    assert np.array_equal(labels.numpy(), expected.astype(np.int64))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_overlay(alpha):
    frame, palette = pixels(9, 11, 3), pixels(5, 3, seed=1)
    labels = np.random.default_rng(2).integers(0, 5, (9, 11)).astype(np.uint8)
    labels[:3] = 255
    arrays = frame, labels, palette
    actual = functional.overlay(*map(torch.from_numpy, arrays), alpha=alpha)
    assert np.array_equal(actual.numpy(), reference.overlay(*arrays, alpha=alpha))
