"""Joint augmentations: equal to their plain definitions, and the random parts as stated."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from support.errors import refused
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets import Sample
from zsseg_rt.training.data import transforms
from zsseg_rt.training.data.photometric import ColourChange, PhotometricDistortion
from zsseg_rt.training.data.transforms import (
    CenterCropAugmentation,
    FitInsideAugmentation,
    ShortEdgeAugmentation,
    fit_inside_hw,
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
    sample = make_sample(*size_hw, dtype=dtype)
    before = sample.image.copy(), sample.labels.copy()
    allowed = {*np.unique(sample.labels).tolist(), int(np.iinfo(dtype).max)}
    for seed in range(5):
        image, (rows, columns), labels = recipe(sample, generator(seed))
        assert image.dtype == torch.uint8
        assert type(image) is torch.Tensor
        assert image.shape == (3, *recipe.crop_hw)
        assert image.is_contiguous()
        assert labels.dtype == torch.int64
        assert type(labels) is torch.Tensor
        assert labels.shape == recipe.crop_hw
        assert 1 <= rows <= recipe.crop_hw[0]
        assert 1 <= columns <= recipe.crop_hw[1]
        assert set(labels.unique().tolist()) <= allowed
    np.testing.assert_array_equal(sample.image, before[0])
    np.testing.assert_array_equal(sample.labels, before[1])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_equal_generators_give_equal_pictures(recipe):
    sample = make_sample()
    first, second = recipe(sample, generator(3)), recipe(sample, generator(3))
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.labels, second.labels)
    if not isinstance(recipe, CenterCropAugmentation):
        images = [recipe(sample, generator(seed)).image for seed in range(8)]
        assert len({image.numpy().tobytes() for image in images}) == 8


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=lambda recipe: type(recipe).__name__)
def test_padding_is_bottom_right_and_ignored(recipe):
    sample = make_sample(30, 41)
    padded = 0
    for seed in range(20):
        image, (rows, columns), labels = recipe(sample, generator(seed))
        padded += (rows, columns) != recipe.crop_hw
        assert (image[:, rows:] == recipe.pad_value).all()
        assert (image[:, :, columns:] == recipe.pad_value).all()
        assert (labels[rows:] == 255).all()
        assert (labels[:, columns:] == 255).all()
    assert padded > 0


@pytest.mark.parametrize("flip_probability", [0.0, 1.0])
def test_picture_and_labels_move_together(flip_probability):
    labels = np.repeat(np.arange(7, dtype=np.uint8)[None].repeat(40, 0), 9, 1)
    image = np.repeat((labels * 30)[..., None], 3, 2)
    recipe = FitInsideAugmentation(
        crop_hw=(32, 32),
        scale=(256, 64),
        flip_probability=flip_probability,
        distortion=None,
        max_class_share=1.0,
    )
    for seed in range(10):
        augmented = recipe(Sample(image, labels, "stripes"), generator(seed))
        rows, columns = augmented.valid_hw
        inside = augmented.labels[:rows, :columns]
        # A blended border column is at most one pixel wide on each side: compare its inside.
        agree = augmented.image[0, :rows, :columns] == inside * 30
        assert agree.float().mean() > 0.7
        steps = inside[0].diff()
        assert (steps <= 0).all() if flip_probability else (steps >= 0).all()


def test_resize_without_randomness_equals_opencv():
    sample = make_sample(60, 83)
    recipe = FitInsideAugmentation(
        crop_hw=(48, 67),
        scale=(512, 48),
        ratio_range=(1.0, 1.0),
        max_class_share=1.0,
        flip_probability=0.0,
        distortion=None,
    )
    image, valid_hw, labels = recipe(sample, generator())
    assert valid_hw == fit_inside_hw((60, 83), (512, 48)) == (48, 66)
    expected = cv2.resize(sample.image, (66, 48), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(image[:, :, :66].permute(1, 2, 0).numpy(), expected)
    rows, columns = np.arange(48) * 60 // 48, np.arange(66) * 83 // 66
    np.testing.assert_array_equal(labels[:, :66].numpy(), sample.labels[rows][:, columns])


@pytest.mark.parametrize(
    ("image_hw", "box", "expected"),
    [
        ((375, 500), (2048, 512), (512, 683)),
        ((500, 375), (2048, 512), (683, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((375, 500), (3000, 750), (750, 1000)),
        ((1, 3000), (1024, 256), (1, 1024)),
    ],
)
def test_fit_inside(image_hw, box, expected):
    assert fit_inside_hw(image_hw, box) == expected


@pytest.mark.parametrize(
    ("image_hw", "edge", "longest", "expected"),
    [
        ((375, 500), 512, None, (512, 683)),
        ((500, 375), 512, 2048, (683, 512)),
        ((100, 1000), 512, 2048, (205, 2048)),
        ((400, 400), 640, 640, (640, 640)),
    ],
)
def test_short_edge(image_hw, edge, longest, expected):
    assert short_edge_hw(image_hw, edge, longest) == expected


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("size_hw", [(31, 40), (120, 160), (60, 83)])
def test_antialiased_resize_is_pillows(size_hw, bicubic):
    image = make_sample(60, 83, seed=4).image
    mode = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    expected = np.asarray(Image.fromarray(image).resize(size_hw[::-1], mode))
    actual = transforms.resize_antialiased(image, size_hw, bicubic)
    difference = np.abs(actual.astype(int) - expected)
    assert difference.max() <= 1  # two fixed-point roundings of the same weights


def test_crop_avoids_dominating_classes():
    labels = np.zeros((64, 256), np.uint8)
    labels[:, 128:] = 1  # only crops near the middle hold less than 75 % of either
    pair = np.zeros((64, 256, 3), np.uint8), labels

    def largest_share(limit, seed):
        _, cropped = transforms.random_crop(pair, (64, 64), limit, 200, generator(seed))
        return max((cropped == 0).mean(), (cropped == 1).mean())

    assert max(largest_share(0.75, seed) for seed in range(30)) < 0.75
    assert max(largest_share(1.0, seed) for seed in range(30)) == 1.0


def test_ignored_pixels_do_not_count_in_a_crop():
    labels = np.full((10, 10), 255, np.uint8)
    labels[0, :3], labels[1, :2] = 4, 7  # 60 % of five annotated pixels
    assert not transforms._one_class_dominates(labels, 0.75)
    assert transforms._one_class_dominates(labels, 0.6)
    labels[1, :2] = 4
    assert transforms._one_class_dominates(labels, 0.75)  # a single class
    assert transforms._one_class_dominates(np.full((3, 3), 255, np.uint8), 0.75)  # none at all


def test_crop_takes_one_more_after_the_last_attempt():
    counted = CountingGenerator()
    pair = np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8)
    transforms.random_crop(pair, (4, 4), 0.75, 10, counted)
    assert counted.crops == 11


class CountingGenerator:
    """Counts the crops that are drawn: two integers each."""

    def __init__(self):
        self.drawn = 0

    def integers(self, high, endpoint):
        self.drawn += 1
        return 0

    @property
    def crops(self):
        return self.drawn / 2


def test_crop_places_are_uniform_and_reach_every_border():
    image = np.zeros((6, 8, 3), np.uint8)
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    rng = generator(1)
    corners = [
        int(transforms.random_crop((image, labels), (4, 5), 1.0, 1, rng)[1][0, 0])
        for _ in range(1200)
    ]
    expected = {row * 8 + column for row in range(3) for column in range(4)}
    assert set(corners) == expected
    assert np.bincount(corners)[sorted(expected)].min() > 60  # 100 each on average


# --- colours ---


def convert(values, factor=1.0, shift=0.0):
    """The plain definition: float32, clipped to 0..255, truncated."""
    return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def change_plainly(image, change):
    """Step by step with no tables."""
    if change.brightness is not None:
        image = convert(image, shift=change.brightness)
    if change.contrast_first and change.contrast is not None:
        image = convert(image, change.contrast)
    if change.saturation is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = convert(hsv[..., 1], change.saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if change.hue is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + change.hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not change.contrast_first and change.contrast is not None:
        image = convert(image, change.contrast)
    return image


@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize("brightness", [None, -32.0, 20.7])
@pytest.mark.parametrize("contrast", [None, 0.5, 1.37])
@pytest.mark.parametrize(("saturation", "hue"), [(None, None), (1.5, -18), (0.6, None), (None, 9)])
def test_colour_change_equals_its_definition(brightness, contrast, saturation, hue, contrast_first):
    image = np.random.default_rng(2).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    change = ColourChange(brightness, contrast, saturation, hue, contrast_first)
    expected = change_plainly(image, change)
    np.testing.assert_array_equal(change.apply(image), expected)
    strided = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(change.apply(strided), expected)


def test_drawn_changes_fill_their_ranges():
    rng = generator(5)
    changes = [PhotometricDistortion().draw(rng) for _ in range(4000)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 18),
    ):
        values = [value for c in changes if (value := getattr(c, name)) is not None]
        assert 0.45 < len(values) / len(changes) < 0.55
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
    assert 0.45 < np.mean([c.contrast_first for c in changes]) < 0.55


def test_no_change_returns_the_picture():
    image = np.zeros((2, 2, 3), np.uint8)
    assert ColourChange().apply(image) is image


# --- settings ---


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: FitInsideAugmentation(crop_hw=(0, 4)), "crop_hw"),
        (lambda: FitInsideAugmentation(ratio_range=(2.0, 0.5)), "ratio_range"),
        (lambda: FitInsideAugmentation(scale=(1, 1)), "scale"),
        (lambda: FitInsideAugmentation(max_class_share=0.0), "max_class_share"),
        (lambda: FitInsideAugmentation(crop_attempts=0), "crop_attempts"),
        (lambda: FitInsideAugmentation(flip_probability=1.5), "flip_probability"),
        (lambda: ShortEdgeAugmentation(pad_value=256), "pad_value"),
        (lambda: ShortEdgeAugmentation(short_edges=()), "short_edges"),
        (lambda: ShortEdgeAugmentation(max_long_edge=100), "max_long_edge"),
        (lambda: CenterCropAugmentation(short_edge=100), "short_edge"),
        (lambda: PhotometricDistortion(hue=91), "hue"),
        (lambda: PhotometricDistortion(contrast=(1.5, 0.5)), "contrast"),
    ],
)
def test_bad_settings_are_named(make, argument):
    with refused(ArgumentError, argument):
        make()


def test_official_defaults():
    assert ShortEdgeAugmentation().short_edges[0] == 256
    assert ShortEdgeAugmentation().short_edges[-1] == 1024
    assert len(ShortEdgeAugmentation().short_edges) == 16
    assert FitInsideAugmentation() == FitInsideAugmentation(distortion=PhotometricDistortion())
