"""Promises of single operations beyond equality with their references; the references are right.

That every operation equals its reference, for drawn arguments, is in test_ops_contract.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import require_cuda
from support.errors import refused
from support.label_agreement import top_two_margin
from support.operation_cases import (
    CLIP,
    COSINE,
    CROP,
    LAST_BIT,
    SUM,
    Case,
    Draw,
    draw_masks,
    draw_planes,
    near,
)
from zsseg_rt import _C, ops
from zsseg_rt.errors import ArgumentError, DeviceError, ShapeError
from zsseg_rt.ops import reference

RAW_PIXELS = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def normal(*shape, seed=0, dtype=np.float32):
    return Draw.seeded(seed, *shape).normal(*shape).astype(dtype)


def planes(height, width):
    return draw_planes(Draw.seeded(height, width), height // 2, width // 2)


def test_bt601_is_opencv_s():
    cv2 = pytest.importorskip("cv2")
    frame = planes(64, 96)
    rgb = cv2.cvtColor(np.concatenate([frame[0], frame[1].reshape(32, 96)]), cv2.COLOR_YUV2RGB_NV12)
    pixels = reference.preprocess(frame, size_hw=(64, 96), **RAW_PIXELS)
    np.testing.assert_array_equal(np.rint(pixels * 255), rgb.transpose(2, 0, 1))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "weights"), [("bt601", (0.299, 0.114)),
                                                 ("bt709", (0.2126, 0.0722))])  # fmt: skip
def test_the_matrices_undo_the_standards_equations(matrix, weights, full):
    """Red and blue have these weights in brightness; 219 and 224 steps lie between the limits."""
    red, blue = weights
    matrix += "-full" if full else ""
    black, grey_steps, colour_steps = (0, 255, 255) if full else (16, 219, 224)
    rgb = np.random.default_rng(0).uniform(0.2, 0.8, (8, 3))
    luma = rgb @ np.array([red, 1 - red - blue, blue])
    u, v = (rgb[:, 2] - luma) / (2 - 2 * blue), (rgb[:, 0] - luma) / (2 - 2 * red)
    y = np.rint(black + grey_steps * luma).astype(np.uint8).repeat(2)[None].repeat(2, axis=0)
    uv = np.rint(128 + colour_steps * np.stack([u, v], -1)).astype(np.uint8)[None]
    pixels = reference.preprocess((y, uv), size_hw=(2, 16), colour_matrix=matrix, **RAW_PIXELS)
    np.testing.assert_allclose(pixels[:, 0, ::2].T, rgb, atol=0.012)  # rounded to bytes three times


@pytest.mark.usefixtures("cpu_isa")
def test_subnormal_and_infinite_float16_are_read_exactly():
    patch_embeds = np.array([6e-8, 6e-5, 65504, 2e-5, -6e-8, 1, 2, 3, 4], np.float16)
    identity = np.eye(9, dtype=np.float16)
    out = ops.patch_text_similarity(patch_embeds.reshape(1, 1, 9), identity, normalize=False)
    np.testing.assert_array_equal(out[0, :, 0], patch_embeds.astype(np.float32))


def test_rows_of_zeros_are_similar_to_nothing(device):
    patch_embeds = normal(1, 3, 8)
    patch_embeds[0, 1], patch_embeds[0, 2, 3] = 0, np.nan
    out = ops.patch_text_similarity(
        device.place(patch_embeds), device.place(normal(2, 8)), stream=device.stream
    )
    assert device.holds(out)
    result = device.fetch(out)
    np.testing.assert_array_equal(result[0, :, 1], 0)
    assert (result[0, :, 0] != 0).all()
    assert np.isnan(result[0]).tolist() == [[False, False, True]] * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("patches", "classes"), [(131, 67), (131, 3), (0, 3)])
def test_finite_tells_of_the_result_every_time(device, dtype, patches, classes):
    patch_embeds = normal(2, patches, 64, dtype=dtype)
    broken = patch_embeds.copy()
    broken[-1:, -1:, -1:] = np.inf
    text_embeds = device.place(normal(classes, 64, dtype=dtype))
    workspace = device.place(np.zeros(8, np.uint8))
    for embeds in (patch_embeds, broken, patch_embeds):
        finite, law = device.poisoned((1,), np.uint8), np.full(1, 7, np.uint8)
        lent = {"workspace": workspace, "stream": device.stream}
        ops.patch_text_similarity(device.place(embeds), text_embeds, finite=finite, **lent)
        assert device.fetch(finite)[0] == (embeds is patch_embeds or patches == 0)
        assert not device.fetch(workspace).any()
        with np.errstate(invalid="ignore"):
            reference.patch_text_similarity(embeds, device.fetch(text_embeds), finite=law)
        assert law[0] == device.fetch(finite)[0]


EMULATED = getattr(ctypes.CDLL(_C.__file__), "cuda_emulation_set_multiprocessors", None)


@pytest.fixture
def set_multiprocessors():
    """Sets how many the emulated GPU has; a real one keeps its own."""
    yield EMULATED or (lambda _count: None)
    if EMULATED is not None:
        EMULATED(1)


def similarity_case(dtype):
    arrays = {"patch_embeds": normal(2, 67, 520), "text_embeds": normal(19, 520)}
    return Case(arrays, {}, near(COSINE), dict.fromkeys(arrays, dtype)), (2, 19, 67)


def descriptor_case(dtype, depth=512):
    arrays = {"cls_embed": normal(1, depth), "text_embeds": normal(20, depth)}
    arrays["weight"] = normal(67, 2 * depth) / np.float32(np.sqrt(depth))
    dtypes = dict.fromkeys(arrays, dtype)
    check = near(SUM + 3 * LAST_BIT[dtype])
    return Case(arrays | {"bias": normal(67)}, {}, check, dtypes), (1, 20, 67)


SHARED = {
    "patch_text_similarity": similarity_case, "relationship_descriptor": descriptor_case,
}  # fmt: skip


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", LAST_BIT)
@pytest.mark.parametrize("count", [1, 30, 132])
@pytest.mark.parametrize("name", SHARED)
def test_blocks_share_the_depth_and_repeat_their_bits(
    device, set_multiprocessors, dtype, count, name
):
    set_multiprocessors(count)
    case, shape = SHARED[name](dtype)
    placed, workspace = case.placed(device), np.zeros(ops.DEPTH_WORKSPACE_BYTES, np.uint8)
    workspace, results = device.place(workspace), []
    for _ in range(3):
        out = device.poisoned(shape, np.float32)
        getattr(ops, name)(**placed, out=out, workspace=workspace, stream=device.stream)
        results.append(device.fetch(out))
    case.check("cpu", results, [getattr(reference, name)(**case.narrowed())])
    for again in results[1:]:
        np.testing.assert_array_equal(again, results[0])
    used = device.fetch(workspace)
    assert not used[:2048].any()
    if EMULATED is not None and name == "patch_text_similarity":
        assert used.any() == (count >= 30)  # there are 2 * 5 tiles


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_on_cuda_a_workspace_has_to_fit(device):
    """``finite`` needs one; memory from its second byte on is not aligned."""
    arrays, finite = similarity_case("float32")[0].placed(device), device.poisoned((1,), np.uint8)
    for workspace in (None, device.place(np.zeros(4, np.uint8))):
        lent = {"finite": finite, "workspace": workspace, "stream": device.stream}
        with refused(ArgumentError, "workspace", "8"):
            ops.patch_text_similarity(**arrays, **lent)
    whole = device.place(np.zeros(4100, np.uint8)).__cuda_array_interface__
    later = whole | {"data": (whole["data"][0] + 1, False), "shape": (4096,), "strides": None}
    later = SimpleNamespace(__cuda_array_interface__=later)
    placed = descriptor_case("float32", 8)[0].placed(device)
    with refused(ArgumentError, "workspace"):
        ops.relationship_descriptor(**placed, workspace=later, stream=device.stream)


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("grid", "out_hw"), [((5, 7), (61, 83)), ((9, 8), (4, 5)), ((1, 3), (9, 1))]
)
def test_reference_agrees_with_torch(activation, grid, out_hw):
    torch = pytest.importorskip("torch")
    logits = 2 * normal(2, 13, *grid)
    values = torch.nn.functional.interpolate(
        torch.from_numpy(logits), size=out_hw, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(
        reference.upsample_bilinear(logits, out_hw), values.numpy(), atol=5e-6
    )
    activate = {"none": lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(1)}
    activated, seen = activate[activation](values), np.arange(13) % 3 == 0
    winners = (activated - 0.2 * torch.from_numpy(seen)[:, None, None]).argmax(1)
    arguments = {"activation": activation, "seen": seen, "seen_bias": 0.2}
    labels, scores = reference.upsample_argmax(logits, out_hw, **arguments, with_scores=True)
    clear = top_two_margin(logits, out_hw, **arguments) > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], winners.numpy()[clear])
    winning = activated.gather(1, winners[:, None])[:, 0].numpy()
    np.testing.assert_allclose(scores[clear], winning[clear], atol=5e-6)


def test_a_workspace_that_does_not_fit_is_refused():
    memory = np.empty((1 << 20) + 129, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]
    for unfit in (memory[:3], memory[1 : 1 + (1 << 20)]):  # too small, and not aligned
        with refused(ShapeError, "workspace"):
            ops.upsample_argmax(normal(1, 21, 5, 4), (33, 29), workspace=unfit)


def test_pixels_of_no_class_are_unknown_whatever_the_table_says(device):
    logits = np.full((1, 3, 2, 2), np.nan, np.float32)
    for dtype in (np.uint8, np.uint16):
        arguments = (device.place(logits), (43, 37))
        table = device.place(np.zeros(65536, dtype))
        labels, _ = ops.upsample_argmax(*arguments, label_table=table, stream=device.stream)
        assert (device.fetch(labels) == np.iinfo(dtype).max).all()
    number, logits = device.place(np.array([0], np.int32)), device.place(normal(1, 40, 6, 5))
    labels, _ = ops.upsample_argmax(logits, (43, 37), num_classes=number, stream=device.stream)
    assert (device.fetch(labels) == 255).all()  # no class counts


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_on_a_gpu_the_number_is_read_when_the_kernel_runs(device):
    """So that a recorded call serves several vocabularies; out of range, the nearest counts."""
    logits, number = normal(2, 9, 6, 5), device.place(np.array([9], np.int32))
    placed = device.place(logits)
    for value, counts in ((-3, 0), (2, 2), (1000, 9)):
        number.copy_from(np.array([value], np.int32), stream=device.stream)
        labels, _ = ops.upsample_argmax(placed, (43, 37), num_classes=number, stream=device.stream)
        counted = np.array([counts], np.int32)
        expected, _ = reference.upsample_argmax(logits, (43, 37), num_classes=counted)
        np.testing.assert_array_equal(device.fetch(labels), expected)


def test_the_edge_is_clamped_for_half_a_cell_and_what_does_not_count_is_not_read(device):
    logits = np.zeros((1, 1, 1, 6), np.float32)
    past = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 1, 6)
    flow = np.zeros((1, 1, 6, 2), np.float32)
    flow[0, 0, :, 0] = [-0.5, -1.5, -2.51, 2.5, 1.51, np.nan]
    flow[0, 0, 2, 1] = 0.5
    unread, still = np.full_like(past, np.nan), np.zeros_like(flow)
    nothing = np.float32([[[0, -1, np.nan] * 2]])
    for arrays, expected in (
        ((logits, past, flow, np.ones((1, 1, 6), np.float32)), [1, 1, 0, 6, 0, 0]),
        ((past, unread, still, nothing), past[0, 0, 0]),
    ):
        result = ops.warp_blend(*map(device.place, arrays), stream=device.stream)
        assert device.holds(result)
        for moved in (device.fetch(result), reference.warp_blend(*arrays)):
            np.testing.assert_array_equal(moved[0, 0, 0], expected)


def test_boxes_of_empty_full_and_thin_masks():
    masks = np.full((5, 4, 6), -1.0, np.float32)
    masks[1] = 1.0
    masks[2, 1, :] = 1.0
    masks[3, 1:3, 2:5] = 1.0
    masks[4, 2, 2] = 1.0
    whole = [0, 0, 6, 4]
    expected = [[*whole, 0], [0, 0, 5, 3, 24], [*whole, 6], [2, 1, 4, 2, 6], [*whole, 1]]
    np.testing.assert_array_equal(ops.mask_boxes(masks, (4, 6)), expected)


@pytest.mark.needs_cuda
def test_what_lies_outside_on_a_gpu_is_moved_inside():
    require_cuda()
    masks, image = draw_masks(Draw.seeded(0), 3, 8, 8), normal(3, 20, 30)
    place = ops.DeviceArray.from_numpy
    wild = np.array([[-9, -9, 99, 99, 1], [40, 50, 3, 2, 1], [5, 6, 5, 6, 1]], np.int32)
    tame = np.array([[0, 0, 30, 20], [29, 19, 30, 20], [5, 6, 6, 7]], np.int32)
    regions, inside = np.array([-7, 1, 2, 99], np.int32), np.array([0, 1, 2, 2], np.int32)
    placed, on_gpu = (place(image), place(masks)), place(regions)
    crops = ops.crop_regions(*placed, on_gpu, place(wild), side=9)
    expected = reference.crop_regions(image, masks, inside, tame[inside], side=9)
    np.testing.assert_allclose(crops.numpy(), expected, rtol=0, atol=CROP)
    with refused(DeviceError, "boxes"):
        ops.crop_regions(*placed, on_gpu, wild, side=9)
    with refused(DeviceError, "regions"):
        ops.crop_regions(image, masks, on_gpu, place(wild), side=9)
    with refused(ShapeError, "boxes", "5", "4"):
        ops.crop_regions(*placed, on_gpu, place(tame), side=9)
    none = place(np.zeros((0, 8, 8), np.float32)), on_gpu, place(wild[:0])
    with refused(ArgumentError, "regions"):
        ops.crop_regions(placed[0], *none, side=9)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_lent_memory_is_enough_and_too_little_is_refused(device):
    masks, weights = normal(5, 4, 4), np.abs(normal(7, 5)) / 10
    placed = device.place(masks), device.place(weights)
    sizes = {"canvas_hw": (8, 8), "out_hw": (9, 13), "stream": device.stream}
    expected, _ = ops.label_regions(*placed, **sizes)
    size = _C.label_regions_device_bytes(7, 5)
    assert size == 64 * 16 * 4 + 64 * 16
    memory = device.poisoned((size,), np.uint8)
    labels, _ = ops.label_regions(*placed, **sizes, workspace=memory)
    np.testing.assert_array_equal(device.fetch(labels), device.fetch(expected))
    less = device.poisoned((size - 1,), np.uint8)
    with refused(ShapeError, "workspace", str(size)):
        ops.label_regions(*placed, **sizes, workspace=less)


def test_bias_ties_thresholds_and_nan():
    masks, sizes = np.full((1, 1, 1), 40.0, np.float32), {"canvas_hw": (1, 1), "out_hw": (1, 1)}
    nan = float("nan")

    def label(*weights, **settings):
        column = np.array(weights, np.float32)[:, None]
        pairs = [
            module.label_regions(masks, column, with_scores=True, **sizes, **settings)
            for module in (ops, reference)
        ]
        assert pairs[0] == pairs[1]
        return tuple(each.item() for each in pairs[0])

    assert label(0.5, 0.5) == (0, 0.5)
    assert label(0.5, 0.5, bias=np.array([0.1, 0.0], np.float32)) == (1, 0.5)
    assert label(0.25, 3.0) == (1, 1.0)
    assert label(0.25, 0.5, unknown_below=0.75) == (255, 0.5)
    assert label(nan, 0.5) == (1, 0.5)
    assert label(nan, nan) == (255, 0.0)


BOXES = [(0, 0, 97, 61), (0, 0, 96, 60), (3, 5, 4, 6), (10, 0, 57, 60), (90, 58, 96, 60)]


@pytest.mark.parametrize("side", [1, 7, 224])
@pytest.mark.parametrize("style", ["crop", "cropmask"])
def test_crops_are_torchvisions(side, style):
    torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
    torchvision = pytest.importorskip("torchvision.ops")
    image, masks = (normal(n, 61, 97) for n in (3, 5))
    boxes, regions = np.array(BOXES, np.int32), np.arange(5, dtype=np.int32)
    crops = ops.crop_regions(image, masks, regions, boxes, side=side, style=style)
    for crop, mask, box in zip(crops, masks, boxes, strict=True):
        shown = torch.from_numpy(image * (mask > 0) if style == "cropmask" else image)
        rows = torch.from_numpy(box[None].astype(np.float32))
        expected = torchvision.roi_align(shown[None], [rows], side, aligned=True)[0]
        np.testing.assert_allclose(crop, expected, rtol=0, atol=CROP)


@pytest.mark.usefixtures("cpu_isa")
def test_planes_may_have_rows_apart():
    luma, chroma = planes(48, 66)
    labels, palette = np.zeros((48, 66), np.uint8), np.uint8([[9, 200, 30]])
    wide = np.zeros((48, 700), np.uint8)
    wide[:, :66] = luma
    apart = (wide[:, :66], chroma)
    drawn = ops.overlay(apart, labels, palette)
    np.testing.assert_array_equal(drawn, reference.overlay((luma, chroma), labels, palette))
    image = ops.preprocess(apart, size_hw=(20, 30), **CLIP)
    np.testing.assert_array_equal(image, ops.preprocess((luma, chroma), size_hw=(20, 30), **CLIP))
    law = reference.preprocess(apart, size_hw=(20, 30), **CLIP)
    np.testing.assert_allclose(image, law, atol=4e-6)


def test_windows_are_added_to_what_is_there(device):
    logits = normal(2, 9, 4, 5)
    shares, places = np.abs(normal(7, 9)), [(0, 0), (3, 4)]
    placed = device.place(logits), device.place(shares)
    out = ops.merge_windows(*placed, places, stream=device.stream)
    again = ops.merge_windows(*placed, places, add=True, out=out, stream=device.stream)
    assert again is out
    expected = reference.merge_windows(logits, shares, places)
    reference.merge_windows(logits, shares, places, add=True, out=expected)
    np.testing.assert_array_equal(device.fetch(out), expected)


@pytest.mark.needs_cuda
def test_arrays_of_two_devices_are_refused():
    require_cuda()
    place = ops.DeviceArray.from_numpy
    logits, (luma, chroma) = place(normal(1, 4, 3, 3)), planes(4, 6)
    for name, other in (
        ("label_table", {"label_table": np.zeros(4, np.uint8)}),
        ("num_classes", {"num_classes": np.ones(1, np.int32)}),
        ("labels", {"out": np.zeros((1, 6, 6), np.uint8)}),
    ):
        with refused(DeviceError, name):
            ops.upsample_argmax(logits, (6, 6), **other)
    with refused(DeviceError, "frame[1]"):
        ops.preprocess((place(luma), chroma), size_hw=(2, 3), **CLIP)
    with refused(DeviceError, "picture"):  # names are written on the CPU alone
        image, weights = np.zeros((4, 5, 3), np.uint8), np.zeros((1, 2, 2), np.uint8)
        ops.ink(place(image), place(weights), (0, 0), [(1, 2, 3)])
