"""Batches are a function of seed and position: workers, processes and resuming change nothing."""

import itertools

import numpy as np
import pytest
import torch

from support.errors import refused
from zsseg_rt.errors import ArgumentError, DatasetError
from zsseg_rt.evaluation.datasets import Sample
from zsseg_rt.training.data import (
    Batch,
    EpochSampler,
    FitInsideAugmentation,
    TrainingSamples,
    collate,
    make_loader,
    normalize_images,
)

AUGMENTATION = FitInsideAugmentation(crop_hw=(16, 24), scale=(128, 32))


class Noise:
    """Pictures made from their index."""

    name = "noise"
    class_names = ("a", "b", "c")
    seen = (0, 1)
    ignore_label = 255

    def __init__(self, length=11, bad=None):
        self.length = length
        self.bad = bad

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.bad:
            raise DatasetError(f"masks/{index}.png: expected values 0..2, got 9. Correct the mask.")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)
        return Sample(image, rng.integers(0, 3, (30, 40)).astype(np.uint8), f"noise-{index}")


def batches_of(loader, count):
    return list(itertools.islice(iter(loader), count))


def same(first: Batch, second: Batch) -> bool:
    return (
        first.names == second.names
        and torch.equal(first.images, second.images)
        and torch.equal(first.labels, second.labels)
        and torch.equal(first.valid_hw, second.valid_hw)
    )


def loader_of(seed=0, num_workers=0, **options):
    options = {"batch_size": 4} | options
    sampler = EpochSampler(11, seed, **options)
    return make_loader(
        TrainingSamples(Noise(), AUGMENTATION, seed), sampler, num_workers=num_workers
    )


def test_batches_have_the_stated_layout_and_order():
    (batch,) = batches_of(loader_of(), 1)
    parts = (batch.images, batch.labels, batch.valid_hw)
    assert [part.shape for part in parts] == [(4, 3, 16, 24), (4, 16, 24), (4, 2)]
    assert [part.dtype for part in parts] == [torch.uint8, torch.int64, torch.int64]
    assert len(set(batch.names)) == 4
    samples = TrainingSamples(Noise(), AUGMENTATION, 0)
    batch = collate([samples[0, 4], samples[1, 2]])
    assert batch.names == ("noise-4", "noise-2")
    assert torch.equal(batch.labels[1], samples[1, 2].labels)


@pytest.mark.parametrize(
    ("options", "skipped"), [({"num_workers": 2}, 0), ({"start_position": 12}, 3)]
)
def test_workers_and_resuming_change_nothing(options, skipped):
    expected, actual = batches_of(loader_of(), 7), batches_of(loader_of(**options), 7 - skipped)
    assert all(map(same, actual, expected[skipped:]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_draws_no_number_of_training(num_workers):
    """Else a resumed run, which opens its data once more, would draw other masks and dropout."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    batches_of(loader_of(num_workers=num_workers), 12)
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_share_the_same_steps():
    expected = batches_of(loader_of(), 5)
    parts = [
        batches_of(loader_of(process_index=process, num_processes=2), 5) for process in range(2)
    ]
    for step, whole in enumerate(expected):
        first, second = parts[0][step], parts[1][step]
        assert torch.equal(torch.cat([first.images, second.images]), whole.images)
        assert torch.equal(torch.cat([first.labels, second.labels]), whole.labels)
        assert first.names + second.names == whole.names


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_holds_every_picture_once(drop_last):
    sampler = EpochSampler(11, 0, batch_size=4, drop_last=drop_last)
    keys = list(itertools.chain.from_iterable(itertools.islice(sampler, 22)))
    assert [position for position, _ in keys] == list(range(88))
    length = 8 if drop_last else 11
    epochs = [
        [index for _, index in keys[start : start + length]] for start in range(0, 88, length)
    ]
    assert all(len(set(epoch)) == length for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    if drop_last:  # the pictures left out differ between epochs
        assert set(itertools.chain.from_iterable(epochs)) == set(range(11))
    else:
        assert all(set(epoch) == set(range(11)) for epoch in epochs)


def message_of(loader) -> str | None:
    """What the data set complains of; keeps no traceback, which would hold the workers."""
    try:
        batches_of(loader, 3)
    except DatasetError as error:
        return str(error)
    return None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_the_data_come_out_as_they_are(num_workers):
    sampler = EpochSampler(11, 0, batch_size=4, drop_last=False)
    loader = make_loader(
        TrainingSamples(Noise(bad=3), AUGMENTATION, 0), sampler, num_workers=num_workers
    )
    assert message_of(loader) == "masks/3.png: expected values 0..2, got 9. Correct the mask."


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"batch_size": 3, "num_processes": 2}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 12}, "batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(options, argument):
    with refused(ArgumentError, argument):
        EpochSampler(11, **{"seed": 0, "batch_size": 1} | options)
    with refused(ArgumentError, "seed"):
        TrainingSamples(Noise(), AUGMENTATION, -1)


def test_normalizes_as_numpy_does_and_pads_afterwards():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, 5, 7), np.uint8)
    labels, valid_hw = torch.zeros(2, 5, 7), torch.tensor([[5, 7], [2, 3]])
    batch = Batch(torch.from_numpy(pixels), valid_hw, labels, ("a", "b"))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    out = normalize_images(batch, mean, std)
    expected = (pixels / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    expected[1, :, 2:] = 0
    expected[1, :, :, 3:] = 0
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)  # float32 against float64
