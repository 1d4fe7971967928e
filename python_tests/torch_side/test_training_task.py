import numpy as np
import pytest

torch = pytest.importorskip("torch")

from zsseg_rt.evaluation.datasets.base import ignore_label  # noqa: E402
from zsseg_rt.training.data.loading import Batch, normalize_images  # noqa: E402


def batch_of(images, valid_hw):
    labels = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64)
    return Batch(images, torch.tensor(valid_hw), labels, ("picture",) * len(images))


def test_normalizes_as_numpy_does_and_pads_afterwards():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, 5, 7), np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    out = normalize_images(batch_of(torch.from_numpy(pixels), [[5, 7], [2, 3]]), mean, std)
    expected = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    expected[1, :, 2:] = 0
    expected[1, :, :, 3:] = 0
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)  # float32 against float64


def test_ignore_label_is_no_class():
    assert [ignore_label(count) for count in (1, 254, 255, 847)] == [255, 255, 65535, 65535]
