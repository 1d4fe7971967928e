"""Joint augmentations: sizes and places equal plain definitions, random parts are as stated."""

import colorsys
import itertools

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from support.errors import refused
from support.toy_training import alike
from tools.scenes import SceneDataset
from zsseg_rt.errors import ArgumentError, DatasetError
from zsseg_rt.evaluation.datasets import Sample
from zsseg_rt.training.data import (
    Batch,
    CenterCropAugmentation,
    EpochSampler,
    FitInsideAugmentation,
    PhotometricDistortion,
    ShortEdgeAugmentation,
    TrainingSamples,
    collate,
    fit_inside_hw,
    make_loader,
    normalize_images,
    random_crop,
    resize,
    seeded,
    short_edge_hw,
)

RECIPES = (
    FitInsideAugmentation(crop_hw=(48, 64), scale=(256, 64)),
    ShortEdgeAugmentation(crop_hw=(48, 64), short_edges=(24, 40, 90), max_long_edge=200),
    CenterCropAugmentation(crop_hw=(48, 64), short_edge=70),
)


def make_sample(height=60, width=83, *, classes=5, dtype=np.uint8, seed=0) -> Sample:
    """Blocks of classes and ignored pixels; the red value of each pixel tells its label."""
    rng = np.random.default_rng(seed)
    ignore = np.iinfo(dtype).max
    coarse = rng.integers(0, classes + 1, (4, 6)).astype(dtype)
    coarse[coarse == classes] = ignore
    labels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    image[..., 0] = np.minimum(labels, 255)
    return Sample(image=image, labels=labels, name="blocks")


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size_hw", [(60, 83), (83, 60), (5, 400), (1, 1)])
def test_result_has_the_stated_layout(recipe, dtype, size_hw):
    sample, ignore = make_sample(*size_hw, dtype=dtype), int(np.iinfo(dtype).max)
    before = sample.image.copy(), sample.labels.copy()
    allowed = {*np.unique(sample.labels).tolist(), ignore}
    padded, images = 0, set()
    for seed in range(12):
        augmented = recipe(sample, generator(seed))
        image, labels, (rows, columns) = augmented.image, augmented.labels, augmented.valid_hw
        assert (image.dtype, type(image)) == (torch.uint8, torch.Tensor)
        assert image.is_contiguous()
        assert (labels.dtype, type(labels)) == (torch.int64, torch.Tensor)
        assert (image.shape, labels.shape) == ((3, *recipe.crop_hw), recipe.crop_hw)
        assert 1 <= rows <= recipe.crop_hw[0]
        assert 1 <= columns <= recipe.crop_hw[1]
        assert set(labels.unique().tolist()) <= allowed
        padded += (rows, columns) != recipe.crop_hw
        images.add(image.numpy().tobytes())
        padding = torch.ones(recipe.crop_hw, dtype=torch.bool)
        padding[:rows, :columns] = False
        assert (labels[padding] == ignore).all()
        assert (image[:, padding] == getattr(recipe, "pad_value", 0)).all()
    if isinstance(recipe, CenterCropAugmentation):
        assert (padded, len(images)) == (0, 1)
    elif min(size_hw) > 1:
        assert padded > 0
        assert len(images) == 12
    np.testing.assert_array_equal(sample.image, before[0])
    np.testing.assert_array_equal(sample.labels, before[1])
    assert torch.equal(recipe(sample, generator(11)).image, image)


@pytest.mark.parametrize("flip_probability", [0.0, 1.0])
def test_resize_without_other_randomness_is_bilinear_and_nearest(flip_probability):
    sample, turn = make_sample(60, 83), -1 if flip_probability else 1
    settings = {"distortion": None, "max_class_share": 1.0, "flip_probability": flip_probability}
    settings |= {"ratio_range": (1.0, 1.0), "crop_hw": (48, 67), "scale": (512, 48)}
    augmented = FitInsideAugmentation(**settings)(sample, generator())
    image, labels, valid_hw = augmented.image, augmented.labels, augmented.valid_hw
    assert valid_hw == fit_inside_hw((60, 83), (512, 48)) == (48, 66)
    expected = cv2.resize(sample.image, (66, 48), interpolation=cv2.INTER_LINEAR)[:, ::turn]
    pixels = image[:, :, :66].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(pixels - expected).max() <= 1  # two fixed-point roundings of the same weights
    rows, columns = np.arange(48) * 60 // 48, np.arange(66) * 83 // 66
    expected = sample.labels[rows][:, columns][:, ::turn]
    np.testing.assert_array_equal(labels[:, :66].numpy(), expected)


@pytest.mark.parametrize(
    ("size", "image_hw", "bounds", "expected"),
    [
        (short_edge_hw, (375, 500), (512, None), (512, 683)),
        (short_edge_hw, (500, 375), (512, 2048), (683, 512)),
        (short_edge_hw, (100, 1000), (512, 2048), (205, 2048)),
        (short_edge_hw, (400, 400), (640, 640), (640, 640)),
        (fit_inside_hw, (375, 500), ((2048, 512),), (512, 683)),
        (fit_inside_hw, (500, 375), ((2048, 512),), (683, 512)),
        (fit_inside_hw, (100, 1000), ((2048, 512),), (205, 2048)),
        (fit_inside_hw, (375, 500), ((3000, 750),), (750, 1000)),
        (fit_inside_hw, (1, 3000), ((1024, 256),), (1, 1024)),
    ],
)
def test_sizes_keep_the_aspect_ratio(size, image_hw, bounds, expected):
    assert size(image_hw, *bounds) == expected


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("size_hw", [(31, 40), (120, 160), (60, 83)])
def test_antialiased_resize_is_pillows(size_hw, bicubic):
    sample = make_sample(60, 83, seed=4)
    mode = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    expected = np.asarray(Image.fromarray(sample.image).resize(size_hw[::-1], mode))
    actual, _ = resize(sample, size_hw, bicubic=bicubic)
    difference = np.abs(actual.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 1  # two fixed-point roundings of the same weights


def crops(labels, crop_hw, share, attempts, *, count, seed=0):
    """Of labels, and of an image that is cropped at the same place."""
    pair = tv_tensors.Image(torch.from_numpy(labels)), tv_tensors.Mask(torch.from_numpy(labels))
    with seeded(generator(seed)):
        for _ in range(count):
            image, crop = random_crop(pair, crop_hw, share, attempts, 255)
            assert torch.equal(image[0], crop)
            yield crop.numpy()


@pytest.mark.parametrize(("share", "accepted"), [(0.75, True), (0.6, False)])
def test_ignored_pixels_do_not_count_in_a_crop(share, accepted):
    labels = np.full((10, 20), 255, np.uint8)
    labels[0, :3], labels[1, :2] = 4, 7  # 60 % of five annotated pixels, where a crop shows them
    counts = [np.count_nonzero(crop < 255) for crop in crops(labels, (10, 10), share, 40, count=60)]
    assert (min(counts) > 2) == accepted  # a crop that shows one class or none is drawn again


@pytest.mark.parametrize(("attempts", "share"), [(1, 0.36), (3, 0.59)])
def test_crop_takes_one_more_after_the_last_attempt(attempts, share):
    labels = np.zeros((1, 6), np.uint8)
    labels[0, 5] = 1  # one of five places shows two classes
    hits = [crop.max() == 1 for crop in crops(labels, (1, 2), 0.75, attempts, count=2000)]
    assert np.mean(hits) == pytest.approx(share, abs=0.05)  # 1 - 0.8^(attempts + 1)


def test_crop_places_are_uniform_and_reach_every_border():
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    corners = [int(crop[0, 0]) for crop in crops(labels, (4, 5), 1.0, 1, count=1200, seed=1)]
    expected = {row * 8 + column for row in range(3) for column in range(4)}
    assert set(corners) == expected
    assert np.bincount(corners)[sorted(expected)].min() > 60  # 100 each on average


ALONE = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0}
RED = (200, 0, 0)


def drawn(colour, count=400, *, probability=1.0, **settings):
    """A colour after augmentation, ``[count, 3]``; only the properties given change."""
    distortion = PhotometricDistortion(probability=probability, **ALONE | settings)
    image = tv_tensors.Image(torch.tensor(colour, dtype=torch.uint8)[:, None, None])
    with seeded(generator(7)):
        return np.array([distortion(image).flatten().tolist() for _ in range(count)])


def degrees(colours):
    hues = np.array([colorsys.rgb_to_hsv(*colour)[0] * 360 for colour in colours / 255])
    return (hues + 180) % 360 - 180


@pytest.mark.parametrize(
    ("settings", "measure", "low", "high"),
    [
        ({"brightness": 32}, lambda pixels: pixels[:, 0] - 128, -32, 32),
        ({"contrast": (0.5, 1.5)}, lambda pixels: pixels[:, 0] / 128, 0.5, 1.5),
        ({"saturation": (0.5, 1.5)}, lambda pixels: np.ptp(pixels, axis=1) / 64, 0.5, 1.5),
        ({"hue": 18}, degrees, -36, 36),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_each_property_fills_its_range_evenly(settings, measure, low, high):
    values = measure(drawn((128, 64, 64), **settings))
    slack = 0.03 * (high - low)  # of rounding and of 400 draws
    assert low - slack < values.min() < low + slack
    assert high - slack < values.max() < high + slack
    assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


def test_contrast_comes_before_or_after_the_colours_by_a_coin():
    reds = drawn(RED, contrast=(2.0, 2.0), saturation=(0.0, 0.0))[:, 0]
    first, last = int(0.2989 * 255), 2 * int(0.2989 * 200)  # clipped before it turns grey, or not
    assert np.abs(reds[:, None] - (first, last)).min(axis=1).max() <= 2
    assert np.mean(np.abs(reds - first) <= 2) == pytest.approx(0.5, abs=0.1)
    # brightness comes first, and saturation before hue
    values = drawn((20, 20, 20), brightness=10, contrast=(3.0, 3.0))
    assert (values % 3 == 0).all()  # a whole value, times three
    assert len(np.unique(values)) > 15
    values = drawn(RED, saturation=(0.0, 0.0), hue=90)
    grey = int(0.2989 * 200)  # that of red, whatever hue would follow
    assert np.abs(values - grey).max() <= 1


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        (FitInsideAugmentation, "crop_hw", (0, 4)),
        (FitInsideAugmentation, "ratio_range", (2.0, 0.5)),
        (FitInsideAugmentation, "scale", (1, 1)),
        (FitInsideAugmentation, "max_class_share", 0.0),
        (ShortEdgeAugmentation, "pad_value", 256),
        (ShortEdgeAugmentation, "short_edges", ()),
        (CenterCropAugmentation, "short_edge", 100),
        (PhotometricDistortion, "hue", 91),
        (PhotometricDistortion, "contrast", (1.5, 0.5)),
    ],
)
def test_bad_settings_are_named(kind, argument, value):
    with refused(ArgumentError, argument):
        kind(**{argument: value})


# --- batches are a function of seed and position ---

AUGMENTATION = FitInsideAugmentation(crop_hw=(16, 24), scale=(128, 32))


class Scenes(SceneDataset):
    """Eleven, one of which may be bad."""

    def __init__(self, bad=None):
        super().__init__("val", size=64, length=11)
        self.bad = bad

    def __getitem__(self, index):
        if index == self.bad:
            raise DatasetError(f"masks/{index}.png: expected values 0..2, got 9. Correct the mask.")
        return super().__getitem__(index)


def batches_of(loader, count):
    return list(itertools.islice(iter(loader), count))


def loader_of(num_workers=0, bad=None, **options):
    sampler = EpochSampler(11, 0, **{"batch_size": 4} | options)
    samples = TrainingSamples(Scenes(bad), AUGMENTATION, 0)
    return make_loader(samples, sampler, num_workers=num_workers)


def test_batches_have_the_stated_layout_and_order():
    (batch,) = batches_of(loader_of(), 1)
    parts = (batch.images, batch.labels, batch.valid_hw)
    assert [part.shape for part in parts] == [(4, 3, 16, 24), (4, 16, 24), (4, 2)]
    assert [part.dtype for part in parts] == [torch.uint8, torch.int64, torch.int64]
    assert len(set(batch.names)) == 4
    samples = TrainingSamples(Scenes(), AUGMENTATION, 0)
    batch = collate([samples[0, 4], samples[1, 2]])
    assert batch.names == ("scenes/val/000004", "scenes/val/000002")
    assert torch.equal(batch.labels[1], samples[1, 2].labels)


@pytest.mark.parametrize(
    ("options", "skipped"), [({"num_workers": 2}, 0), ({"start_position": 12}, 3)]
)
def test_workers_and_resuming_change_nothing(options, skipped):
    expected, actual = batches_of(loader_of(), 7), batches_of(loader_of(**options), 7 - skipped)
    assert alike(list(map(vars, actual)), list(map(vars, expected[skipped:])))


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


@pytest.mark.parametrize(("batch_size", "length"), [(4, 8), (16, 11)])
def test_an_epoch_holds_every_picture_once(batch_size, length):
    sampler = EpochSampler(11, 0, batch_size=batch_size)
    keys = list(itertools.chain.from_iterable(itertools.islice(sampler, 22)))[:88]
    assert [position for position, _ in keys] == list(range(88))
    epochs = [
        [index for _, index in keys[start : start + length]] for start in range(0, 88, length)
    ]
    assert all(len(set(epoch)) == length for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    # the pictures left out differ between epochs
    assert set(itertools.chain.from_iterable(epochs)) == set(range(11))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_the_data_come_out_as_they_are(num_workers):
    with pytest.raises(DatasetError, match=r"^masks/3\.png: expected .* Correct the mask\.$"):
        batches_of(loader_of(num_workers, bad=3, batch_size=11), 3)


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
