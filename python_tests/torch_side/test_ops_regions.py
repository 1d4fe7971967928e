"""mask_boxes, crop_regions and label_regions: the law is ops.reference."""

import numpy as np
import pytest

from conftest import require_cuda
from support.errors import refused
from zsseg_rt import _C, ops
from zsseg_rt.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from zsseg_rt.ops import reference

# Means of up to 9 float32 samples of values up to 4, summed in another order: worst seen 1.5e-6.
CROP_TOLERANCE = 5e-6
# Sums of up to 100 products of at most 1, and an exponential good to 2 ulp: worst seen 4e-6.
SCORE_TOLERANCE = 2e-5
NORMALISATION = {"scale": (0.9, 1.1, 1.0), "offset": (0.1, -0.2, 0.0)}


def smooth_masks(count, height, width, seed=0):
    """Mask logits with areas of either sign; the last three are empty, full and one pixel."""
    masks = np.random.default_rng(seed).standard_normal((count, height, width)).astype(np.float32)
    masks[-3], masks[-2], masks[-1] = -1.0, 1.0, -1.0
    masks[-1, height // 2, width // 2] = 0.3
    return masks


def picture(height, width):
    return np.random.default_rng(1).standard_normal((3, height, width)).astype(np.float32)


def boxes_of(masks, canvas_hw):
    return np.ascontiguousarray(reference.mask_boxes(masks, canvas_hw)[:, :4])


GRIDS = [((1, 1), (1, 1)), ((1, 1), (5, 7)), ((3, 1), (31, 17)), ((7, 5), (28, 20))]
GRIDS += [((16, 12), (61, 97)), ((9, 13), (9, 13)), ((20, 30), (11, 7))]
LONG_GRIDS = [((50, 16), (200, 61)), ((3, 1100), (2, 1300)), ((2, 2), (3000, 2))]


@pytest.mark.parametrize(("grid_hw", "canvas_hw"), GRIDS + LONG_GRIDS)
def test_boxes_are_the_reference_s(device, grid_hw, canvas_hw):
    masks = smooth_masks(6, *grid_hw)
    boxes = ops.mask_boxes(device.place(masks), canvas_hw, stream=device.stream)
    assert device.holds(boxes)
    np.testing.assert_array_equal(device.fetch(boxes), reference.mask_boxes(masks, canvas_hw))


def test_boxes_of_empty_full_and_thin_masks():
    masks = np.full((5, 4, 6), -1.0, np.float32)
    masks[1] = 1.0
    masks[2, 1, :] = 1.0
    masks[3, 1:3, 2:5] = 1.0
    masks[4, 2, 2] = 1.0
    whole = [0, 0, 6, 4]
    expected = [[*whole, 0], [0, 0, 5, 3, 24], [*whole, 6], [2, 1, 4, 2, 6], [*whole, 1]]
    np.testing.assert_array_equal(ops.mask_boxes(masks, (4, 6)), expected)


def test_boxes_of_masks_that_almost_vanish(device):
    masks = np.random.default_rng(3).standard_normal((4, 6, 8)).astype(np.float32)
    masks *= np.array([1e-30, 1e-38, 1e-44, 0.0], np.float32)[:, None, None]
    boxes = ops.mask_boxes(device.place(masks), (23, 31), stream=device.stream)
    np.testing.assert_array_equal(device.fetch(boxes), reference.mask_boxes(masks, (23, 31)))


@pytest.mark.parametrize("style", ["cropmask", "crop", "mask"])
@pytest.mark.parametrize("side", [1, 7, 32])
@pytest.mark.parametrize(("grid_hw", "canvas_hw"), GRIDS[1:])
def test_crops_match_the_reference(device, grid_hw, canvas_hw, side, style):
    masks, image = smooth_masks(6, *grid_hw), picture(*canvas_hw)
    regions = np.array([5, 0, 3, 4, 1], np.int32)
    boxes = np.ascontiguousarray(boxes_of(masks, canvas_hw)[regions])
    settings = {"side": side, "style": style, **NORMALISATION}
    crops = ops.crop_regions(
        device.place(image), device.place(masks), regions, boxes, stream=device.stream, **settings
    )
    assert device.holds(crops)
    expected = reference.crop_regions(image, masks, regions, boxes, **settings)
    np.testing.assert_allclose(device.fetch(crops), expected, rtol=0, atol=CROP_TOLERANCE)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("style", ["cropmask", "mask"])
def test_crops_on_every_instruction_set_and_thread_count(style):
    masks, image = smooth_masks(9, 24, 40), picture(96, 160)
    regions = np.arange(9, dtype=np.int32)
    arguments = (image, masks, regions, boxes_of(masks, (96, 160)))
    crops = ops.crop_regions(*arguments, side=57, style=style)
    expected = reference.crop_regions(*arguments, side=57, style=style)
    np.testing.assert_allclose(crops, expected, rtol=0, atol=CROP_TOLERANCE)
    boxes = ops.mask_boxes(masks, (96, 160))
    np.testing.assert_array_equal(boxes, reference.mask_boxes(masks, (96, 160)))


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 97, 61), (90, 58, 97, 61), (96, 0, 97, 61)])
def test_crops_of_any_box(device, box):
    masks, image = smooth_masks(3, 16, 25), picture(61, 97)
    arguments = (np.array([1], np.int32), np.array([box], np.int32))
    crops = ops.crop_regions(
        device.place(image), device.place(masks), *arguments, side=20, stream=device.stream
    )
    expected = reference.crop_regions(image, masks, *arguments, side=20)
    np.testing.assert_allclose(device.fetch(crops), expected, rtol=0, atol=CROP_TOLERANCE)


@pytest.mark.parametrize("style", ["cropmask", "crop"])
@pytest.mark.parametrize(("canvas_hw", "side"), [((12, 700), 2), ((130, 9), 3), ((40, 600), 300)])
def test_crops_of_long_boxes(device, canvas_hw, side, style):
    masks, image = smooth_masks(4, 10, 20), picture(*canvas_hw)
    whole = np.array([[0, 0, canvas_hw[1], canvas_hw[0]]], np.int32)
    arguments = (np.array([0], np.int32), whole)
    settings = {"side": side, "style": style, **NORMALISATION}
    crops = ops.crop_regions(
        device.place(image), device.place(masks), *arguments, stream=device.stream, **settings
    )
    expected = reference.crop_regions(image, masks, *arguments, **settings)
    np.testing.assert_allclose(device.fetch(crops), expected, rtol=0, atol=CROP_TOLERANCE)


def test_an_empty_mask_shows_nothing_whatever_the_offset(device):
    masks, image = smooth_masks(3, 8, 8), picture(32, 32)
    crops = ops.crop_regions(
        device.place(image), device.place(masks), np.array([0], np.int32),
        np.array([[0, 0, 32, 32]], np.int32), side=8, offset=(1.0, 1.0, 1.0), stream=device.stream,
    )  # fmt: skip
    assert not device.fetch(crops).any()


@pytest.mark.parametrize("style", ["cropmask", "crop", "mask"])
def test_crops_of_boxes_as_they_were_found(device, style):
    """On a GPU neither regions nor boxes come back to the host in between."""
    masks, image = smooth_masks(6, 16, 12), picture(61, 97)
    regions = np.array([5, 0, 3, 4, 1, 1], np.int32)
    placed = device.place(masks)
    boxes = ops.mask_boxes(placed, (61, 97), stream=device.stream)
    settings = {"side": 33, "style": style, **NORMALISATION}
    crops = ops.crop_regions(
        device.place(image), placed, device.place(regions), boxes, stream=device.stream, **settings
    )
    own = boxes_of(masks, (61, 97))[regions]
    expected = reference.crop_regions(image, masks, regions, own, **settings)
    np.testing.assert_allclose(device.fetch(crops), expected, rtol=0, atol=CROP_TOLERANCE)
    every = reference.mask_boxes(masks, (61, 97))
    again = reference.crop_regions(image, masks, regions, every, **settings)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.needs_cuda
def test_what_lies_outside_on_a_gpu_is_moved_inside():
    require_cuda()
    masks, image = smooth_masks(3, 8, 8), picture(20, 30)
    place = ops.DeviceArray.from_numpy
    wild = np.array([[-9, -9, 99, 99, 1], [40, 50, 3, 2, 1], [5, 6, 5, 6, 1]], np.int32)
    tame = np.array([[0, 0, 30, 20], [29, 19, 30, 20], [5, 6, 6, 7]], np.int32)
    regions, inside = np.array([-7, 1, 2, 99], np.int32), np.array([0, 1, 2, 2], np.int32)
    crops = ops.crop_regions(place(image), place(masks), place(regions), place(wild), side=9)
    expected = reference.crop_regions(image, masks, inside, tame[inside], side=9)
    np.testing.assert_allclose(crops.numpy(), expected, rtol=0, atol=CROP_TOLERANCE)
    placed = place(image), place(masks)
    with refused(DeviceError, "boxes"):
        ops.crop_regions(*placed, place(regions), wild, side=9)
    with refused(DeviceError, "regions"):
        ops.crop_regions(image, masks, place(regions), place(wild), side=9)
    with refused(ShapeError, "boxes", "5", "4"):
        ops.crop_regions(*placed, place(regions), place(tame), side=9)
    none = place(np.zeros((0, 8, 8), np.float32)), place(regions), place(wild[:0])
    with refused(ArgumentError, "regions"):
        ops.crop_regions(placed[0], *none, side=9)


def test_crops_fill_what_is_given_and_none_is_no_crop(device):
    masks, image = smooth_masks(3, 8, 8), picture(32, 32)
    placed = device.place(image), device.place(masks)
    out = device.poisoned((1, 3, 9, 9), np.float32)
    regions, boxes = np.array([1], np.int32), np.array([[3, 2, 30, 31]], np.int32)
    result = ops.crop_regions(*placed, regions, boxes, side=9, out=out, stream=device.stream)
    assert result is out
    expected = reference.crop_regions(image, masks, regions, boxes, side=9)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=CROP_TOLERANCE)
    none = ops.crop_regions(*placed, regions[:0], boxes[:0], side=9, stream=device.stream)
    assert device.fetch(none).shape == (0, 3, 9, 9)


def scores_of(num_classes, num_regions, seed=2):
    return np.random.default_rng(seed).random((num_classes, num_regions)).astype(np.float32)


def assert_labelled_alike(found, expected, masks, weights, bias, canvas_hw, out_hw):
    """Labels may differ only where the two best classes are closer than the scores' tolerance."""
    from zsseg_rt.ops.reference_regions import score_maps

    (labels, scores), (wanted, wanted_scores) = found, expected
    values = score_maps(masks, weights, canvas_hw, out_hw) - bias[:, None, None]
    np.testing.assert_allclose(scores, wanted_scores, rtol=0, atol=SCORE_TOLERANCE)
    ranked = np.sort(values, axis=0)
    clear = ranked[-1] - ranked[-2] > 2 * SCORE_TOLERANCE if len(values) > 1 else labels == labels
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], wanted[clear])


@pytest.mark.parametrize("num_classes", [1, 3, 254, 255])
@pytest.mark.parametrize(("grid_hw", "canvas_hw"), [((1, 1), (1, 1)), ((7, 5), (28, 21))])
@pytest.mark.parametrize("out_hw", [(1, 1), (13, 9), (50, 67)])
def test_labels_match_the_reference(device, num_classes, grid_hw, canvas_hw, out_hw):
    masks = smooth_masks(5, *grid_hw)
    weights = scores_of(num_classes, 5) / 5
    bias = np.where(np.arange(num_classes) % 2, 0.1, 0.0).astype(np.float32)
    sizes = {"canvas_hw": canvas_hw, "out_hw": out_hw, "with_scores": True}
    labels, scores = ops.label_regions(
        device.place(masks), device.place(weights), bias=device.place(bias), stream=device.stream,
        **sizes,
    )  # fmt: skip
    assert device.holds(labels)
    assert device.holds(scores)
    found = device.fetch(labels), device.fetch(scores)
    assert found[0].dtype == (np.uint8 if num_classes < 255 else np.uint16)
    expected = reference.label_regions(masks, weights, bias=bias, **sizes)
    assert_labelled_alike(found, expected, masks, weights, bias, canvas_hw, out_hw)


VOTES = [  # masks, their grid, canvas, result
    (100, (7, 5), (28, 21), (28, 21)),
    (256, (6, 6), (11, 9), (11, 9)),
    (256, (6, 6), (9, 17), (33, 40)),
    (120, (4, 4), (13, 12), (20, 31)),
    (17, (2, 2), (2, 2), (70, 75)),
    (3, (2, 3), (1, 5), (40, 5)),
]


@pytest.mark.parametrize(("num_regions", "grid_hw", "canvas_hw", "out_hw"), VOTES)
def test_labels_of_many_masks(device, num_regions, grid_hw, canvas_hw, out_hw):
    masks = smooth_masks(num_regions, *grid_hw)
    weights = scores_of(70, num_regions) / num_regions
    sizes = {"canvas_hw": canvas_hw, "out_hw": out_hw, "with_scores": True}
    labels, scores = ops.label_regions(
        device.place(masks), device.place(weights), stream=device.stream, **sizes
    )
    expected = reference.label_regions(masks, weights, **sizes)
    bias = np.zeros(70, np.float32)
    found = device.fetch(labels), device.fetch(scores)
    assert_labelled_alike(found, expected, masks, weights, bias, canvas_hw, out_hw)


@pytest.mark.parametrize("out_hw", [(12, 10), (17, 25)])
def test_labels_of_scores_of_any_size(device, out_hw):
    masks, weights = smooth_masks(20, 4, 5), scores_of(9, 20)
    # Only a class of its own size can win: each is larger than the others by its bias.
    sizes = np.array([1e-38, 1e-30, 1e-4, 1e-2, 1.0, 0.0, 1e-20, 1e-10, 1e-7], np.float32)
    weights = weights * sizes[:, None]
    settings = {"canvas_hw": (12, 10), "out_hw": out_hw, "with_scores": True}
    for kept in range(9):
        bias = np.where(np.arange(9) == kept, 0.0, 100.0).astype(np.float32)
        labels, scores = ops.label_regions(
            device.place(masks), device.place(weights), bias=device.place(bias),
            stream=device.stream, **settings,
        )  # fmt: skip
        expected = reference.label_regions(masks, weights, bias=bias, **settings)
        np.testing.assert_array_equal(device.fetch(labels), expected[0])
        np.testing.assert_allclose(device.fetch(scores), expected[1], rtol=2e-5, atol=1e-44)


@pytest.mark.parametrize("out_hw", [(8, 8), (9, 13)])
def test_infinite_and_missing_scores(device, out_hw):
    masks, weights = smooth_masks(6, 4, 4), scores_of(6, 6) / 6
    infinity = float("inf")
    weights[1, 3], weights[2, 0], weights[3, 1:3] = float("nan"), -infinity, (infinity, -infinity)
    settings = {"canvas_hw": (8, 8), "out_hw": out_hw, "with_scores": True}
    for best in (0.0, infinity):
        weights[4, 5] = max(weights[4, 5], best)
        labels, scores = ops.label_regions(
            device.place(masks), device.place(weights), stream=device.stream, **settings
        )
        with np.errstate(invalid="ignore"):
            expected = reference.label_regions(masks, weights, **settings)
        np.testing.assert_array_equal(device.fetch(labels), expected[0])
        np.testing.assert_allclose(device.fetch(scores), expected[1], atol=SCORE_TOLERANCE)


def test_labels_fill_what_is_given(device):
    masks, weights = smooth_masks(5, 4, 4), scores_of(7, 5) / 5
    sizes = {"canvas_hw": (8, 8), "out_hw": (9, 13)}
    placed = device.place(masks), device.place(weights)
    labels = device.poisoned((9, 13), np.uint8)
    scores = device.poisoned((9, 13), np.float32)
    found = ops.label_regions(
        *placed, **sizes, with_scores=True, out=(labels, scores), stream=device.stream
    )
    assert found[0] is labels
    assert found[1] is scores
    expected = reference.label_regions(masks, weights, **sizes, with_scores=True)
    bias = np.zeros(7, np.float32)
    found = device.fetch(labels), device.fetch(scores)
    assert_labelled_alike(found, expected, masks, weights, bias, (8, 8), (9, 13))
    alone, _ = ops.label_regions(*placed, **sizes, out=labels, stream=device.stream)
    assert alone is labels


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ((np.zeros((5, 5), np.uint8),) * 3, "a pair of labels and scores, got 3 arrays"),
        ((np.zeros((5, 5), np.uint8), np.zeros((5, 5), np.float32)), "got labels and scores"),
    ],
)
def test_results_that_nobody_asked_for(out, message):
    with refused(ArgumentError, "out"):
        ops.label_regions(**LABEL, out=out)


def test_lent_memory_is_enough_and_too_little_is_refused(device):
    masks, weights = smooth_masks(5, 4, 4), scores_of(7, 5) / 5
    placed = device.place(masks), device.place(weights)
    sizes = {"canvas_hw": (8, 8), "out_hw": (9, 13), "stream": device.stream}
    expected, _ = ops.label_regions(*placed, **sizes)
    if device.name == "cpu":
        pytest.skip("what the CPU needs depends on its threads")
    size = _C.label_regions_device_bytes(7, 5)
    assert size == 64 * 16 * 4 + 64 * 16
    memory = device.poisoned((size,), np.uint8)
    labels, _ = ops.label_regions(*placed, **sizes, workspace=memory)
    np.testing.assert_array_equal(device.fetch(labels), device.fetch(expected))
    less = device.poisoned((size - 1,), np.uint8)
    with refused(ShapeError, "workspace", str(size)):
        ops.label_regions(*placed, **sizes, workspace=less)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("out_hw", [(45, 61), (128, 160), (301, 203)])
def test_labels_on_every_instruction_set_and_thread_count(out_hw):
    masks, weights = smooth_masks(33, 32, 40), scores_of(19, 33) / 33
    sizes = {"canvas_hw": (128, 160), "out_hw": out_hw, "with_scores": True}
    found = ops.label_regions(masks, weights, **sizes)
    expected = reference.label_regions(masks, weights, **sizes)
    bias = np.zeros(19, np.float32)
    assert_labelled_alike(found, expected, masks, weights, bias, (128, 160), out_hw)


def test_masks_become_soft_on_the_canvas_not_after_it():
    masks = np.array([[[-9.0, 9.0]], [[0.3, 0.3]]], np.float32)
    weights = np.eye(2, dtype=np.float32)
    sizes = {"canvas_hw": (1, 2), "out_hw": (1, 4), "with_scores": True}
    for module in (ops, reference):
        labels, scores = module.label_regions(masks, weights, **sizes)
        assert labels.tolist() == [[1, 1, 0, 0]]  # sigmoid(9) / 4 + ..., not sigmoid(9 / 4)
        np.testing.assert_allclose(scores[0], [0.5744, 0.5744, 0.75, 0.9999], atol=1e-4)


def test_bias_ties_thresholds_and_nan():
    masks, sizes = np.full((1, 1, 1), 40.0, np.float32), {"canvas_hw": (1, 1), "out_hw": (1, 1)}
    nan = float("nan")

    def label(*weights, **settings):
        column = np.array(weights, np.float32)[:, None]
        pairs = [
            module.label_regions(masks, column, with_scores=True, **sizes, **settings)
            for module in (ops, reference)
        ]
        (label, score), (wanted, wanted_score) = pairs
        assert (label, score) == (wanted, wanted_score)
        return int(label[0, 0]), float(score[0, 0])

    assert label(0.5, 0.5) == (0, 0.5)
    assert label(0.5, 0.5, bias=np.array([0.1, 0.0], np.float32)) == (1, 0.5)
    assert label(0.25, 3.0) == (1, 1.0)
    assert label(0.25, 0.5, unknown_below=0.75) == (255, 0.5)
    assert label(nan, 0.5) == (1, 0.5)
    assert label(nan, nan) == (255, 0.0)


MASKS, IMAGE = smooth_masks(3, 4, 5), picture(16, 20)
CROP = {
    "image": IMAGE,
    "mask_logits": MASKS,
    "regions": np.array([0, 2], np.int32),
    "boxes": np.array([[0, 0, 20, 16], [1, 2, 3, 4]], np.int32),
    "side": 8,
}
BOX_ERROR = r"boxes: expected x1 < x2 and y1 < y2 within the image, got "
BAD_CROPS = [
    ({"image": IMAGE[:2]}, ShapeError, r"image: expected shape \(3, \*, \*\), got \(2, 16, 20\)"),
    ({"image": IMAGE.astype(np.float64)}, DTypeError, "image: expected float32, got float64"),
    ({"image": np.zeros((3, 1, 5000), np.float32)}, ShapeError, "sides from 1 to 4096"),
    ({"mask_logits": MASKS[0]}, ShapeError, r"mask_logits: expected shape \(\*, \*, \*\)"),
    ({"mask_logits": MASKS[:, :0]}, ShapeError, "mask_logits: expected sides from 1 to 4096"),
    ({"regions": np.array([0, 3], np.int32)}, ArgumentError, "of the masks, below 3, got 3"),
    ({"regions": np.array([-1, 0], np.int32)}, ArgumentError, "below 3, got -1"),
    ({"regions": np.zeros(65, np.int32)}, ShapeError, "regions: expected at most 64, got 65"),
    ({"regions": np.zeros(2, np.int64)}, DTypeError, "regions: expected int32, got int64"),
    ({"boxes": np.zeros((2, 6), np.int32)}, ShapeError, r"boxes: expected shape \(2, 4\)"),
    ({"boxes": np.zeros((2, 5), np.int32)}, ShapeError, r"boxes: expected shape \(3, 5\)"),
    ({"boxes": np.zeros((3, 5), np.int32)}, ArgumentError, "x1 < x2 and y1 < y2 within the image"),
    ({"boxes": np.array([[0, 0, 21, 16]] * 2, np.int32)}, ArgumentError, BOX_ERROR),
    ({"boxes": np.array([[4, 0, 4, 16]] * 2, np.int32)}, ArgumentError, BOX_ERROR),
    ({"side": 0}, ArgumentError, "side: expected from 1 to 1024, got 0"),
    ({"style": "box"}, ArgumentError, "style: expected 'cropmask', 'mask' or 'crop', got 'box'"),
    ({"scale": (1, 1)}, ArgumentError, "scale: expected 3 finite numbers, got 2 numbers"),
    ({"offset": (0, float("inf"), 0)}, ArgumentError, "offset: expected 3 finite numbers, got"),
    ({"out": np.zeros((2, 3, 8, 9), np.float32)}, ShapeError, r"out: expected shape \(2, 3, 8"),
]
LABEL = {"mask_logits": MASKS, "class_scores": scores_of(4, 3), "canvas_hw": (8, 8)}
LABEL |= {"out_hw": (5, 5)}
BAD_LABELS = [
    ({"mask_logits": MASKS.astype(np.float16)}, DTypeError, "mask_logits: expected float32"),
    ({"class_scores": scores_of(4, 2)}, ShapeError, r"class_scores: expected shape \(\*, 3\)"),
    ({"class_scores": scores_of(0, 3)}, ShapeError, "from 1 to 65534 classes"),
    ({"bias": np.zeros(3, np.float32)}, ShapeError, r"bias: expected shape \(4,\), got \(3,\)"),
    ({"canvas_hw": (0, 8)}, ShapeError, r"canvas_hw: expected sides from 1 to 32767, got \(0, 8\)"),
    ({"out_hw": (5, 40000)}, ShapeError, "out_hw: expected sides"),
    ({"unknown_below": float("nan")}, ArgumentError, "unknown_below: expected a number or None"),
]
BAD_BOXES = [
    ({"canvas_hw": (5000, 8)}, ShapeError, "canvas_hw: expected sides from 1 to 4096"),
    ({"out": np.zeros((3, 4), np.int32)}, ShapeError, r"out: expected shape \(3, 5\)"),
]
CASES = [("crop_regions", CROP, *case) for case in BAD_CROPS]
CASES += [("label_regions", LABEL, *case) for case in BAD_LABELS]
CASES += [("mask_boxes", {"mask_logits": MASKS, "canvas_hw": (8, 8)}, *case) for case in BAD_BOXES]


@pytest.mark.parametrize(("name", "good", "change", "error", "message"), CASES)
def test_bad_arguments_are_refused(name, good, change, error, message):
    with pytest.raises(error, match=message):
        getattr(ops, name)(**{**good, **change})


def test_too_many_masks_to_vote():
    masks = np.zeros((257, 2, 2), np.float32)
    with refused(ShapeError, "class_scores"):
        ops.label_regions(masks, scores_of(2, 257), canvas_hw=(4, 4), out_hw=(4, 4))


BOXES = [(0, 0, 97, 61), (0, 0, 96, 60), (3, 5, 4, 6), (10, 0, 57, 60), (90, 58, 96, 60)]


@pytest.mark.parametrize("side", [1, 7, 32, 224])
@pytest.mark.parametrize("style", ["crop", "cropmask"])
def test_crops_are_torchvisions(side, style):
    torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
    torchvision = pytest.importorskip("torchvision.ops")
    rng = np.random.default_rng(0)
    image, masks = (rng.standard_normal((n, 61, 97), np.float32) for n in (3, 5))
    boxes, regions = np.array(BOXES, np.int32), np.arange(5, dtype=np.int32)
    crops = ops.crop_regions(image, masks, regions, boxes, side=side, style=style)
    for crop, mask, box in zip(crops, masks, boxes, strict=True):
        shown = torch.from_numpy(image * (mask > 0) if style == "cropmask" else image)
        rows = torch.from_numpy(box[None].astype(np.float32))
        expected = torchvision.roi_align(shown[None], [rows], side, aligned=True)[0]
        np.testing.assert_allclose(crop, expected, rtol=0, atol=CROP_TOLERANCE)
