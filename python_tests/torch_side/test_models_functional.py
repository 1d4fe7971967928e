"""The torch kernels against the NumPy definitions."""

import numpy as np
import pytest
import torch

from zsseg_rt.models import functional
from zsseg_rt.ops import reference


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_equal(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=atol)


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
