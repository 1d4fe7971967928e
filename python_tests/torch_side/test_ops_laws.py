"""Promises of single operations beyond equality with their references; the references are right.

That every operation equals its reference, for drawn arguments, is in test_ops_contract.
"""

import ctypes

import numpy as np
import pytest

from conftest import require_cuda
from support.bfloat16 import Bfloat16Array, bfloat16_bits, widened
from support.errors import refused
from support.label_agreement import top_two_margin
from support.operation_cases import CLIP, COSINE, CROP, LAST_BIT, SUM
from zsseg_rt import _C, ops
from zsseg_rt.errors import ArgumentError, DeviceError, ShapeError
from zsseg_rt.ops import reference

ACTIVATIONS = ["none", "sigmoid", "softmax"]


def random_frame(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def nv12_frame(height, width):
    """Every brightness beside every colour, out of the limited range too."""
    generator = np.random.default_rng(height + width)
    return (
        generator.integers(0, 256, (height, width), np.uint8),
        generator.integers(0, 256, (height // 2, width // 2, 2), np.uint8),
    )


def random_embeds(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


class Numbers:
    """Random numbers that a dtype holds, as float32 and as an array of that dtype on a device."""

    def __init__(self, device, dtype, values):
        if dtype == "bfloat16":
            bits = bfloat16_bits(values)
            self.wide, self.placed = widened(bits), Bfloat16Array(device.place(bits))
        else:
            narrow = values.astype(dtype)
            self.wide, self.placed = narrow.astype(np.float32), device.place(narrow)


def descriptor_arguments(device, dtype, batch, classes, embed_dim, outputs):
    weight = random_embeds(outputs, 2 * embed_dim) / np.sqrt(embed_dim)
    halves = (random_embeds(batch, embed_dim), random_embeds(classes, embed_dim), weight)
    numbers = [Numbers(device, dtype, values) for values in halves]
    bias = random_embeds(outputs)
    return [each.placed for each in numbers] + [device.place(bias)], [
        *(each.wide for each in numbers),
        bias,
    ]


def random_logits(*shape, scale=2.0, dtype=np.float32):
    return (scale * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(dtype)


def some_seen(classes):
    return np.arange(classes) % 3 == 0


def smooth_masks(count, height, width, seed=0):
    """Mask logits with areas of either sign; the last three are empty, full and one pixel."""
    masks = np.random.default_rng(seed).standard_normal((count, height, width)).astype(np.float32)
    masks[-3], masks[-2], masks[-1] = -1.0, 1.0, -1.0
    masks[-1, height // 2, width // 2] = 0.3
    return masks


def random_image(height, width):
    return np.random.default_rng(1).standard_normal((3, height, width)).astype(np.float32)


def scores_of(num_classes, num_regions, seed=2):
    return np.random.default_rng(seed).random((num_classes, num_regions)).astype(np.float32)


def test_bt601_is_opencv_s():
    cv2 = pytest.importorskip("cv2")
    frame = nv12_frame(64, 96)
    planes = np.concatenate([frame[0], frame[1].reshape(32, 96)])
    rgb = cv2.cvtColor(planes, cv2.COLOR_YUV2RGB_NV12)
    settings = {"size_hw": (64, 96), "mean": (0, 0, 0), "std": (1, 1, 1)}
    np.testing.assert_array_equal(
        np.rint(reference.preprocess(frame, **settings) * 255), rgb.transpose(2, 0, 1)
    )


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
    settings = {"size_hw": (2, 16), "mean": (0, 0, 0), "std": (1, 1, 1)}
    pixels = reference.preprocess((y, uv), colour_matrix=matrix, **settings)
    np.testing.assert_allclose(pixels[:, 0, ::2].T, rgb, atol=0.012)  # rounded to bytes three times


@pytest.mark.usefixtures("cpu_isa")
def test_subnormal_and_infinite_float16_are_read_exactly():
    patch_embeds = np.array([6e-8, 6e-5, 65504, 2e-5, -6e-8, 1, 2, 3, 4], np.float16)
    identity = np.eye(9, dtype=np.float16)
    out = ops.patch_text_similarity(patch_embeds.reshape(1, 1, 9), identity, normalize=False)
    np.testing.assert_array_equal(out[0, :, 0], patch_embeds.astype(np.float32))


def test_rows_of_zeros_are_similar_to_nothing(device):
    patch_embeds = random_embeds(1, 3, 8)
    patch_embeds[0, 1], patch_embeds[0, 2, 3] = 0, np.nan
    out = ops.patch_text_similarity(
        device.place(patch_embeds), device.place(random_embeds(2, 8)), stream=device.stream
    )
    assert device.holds(out)
    result = device.fetch(out)
    np.testing.assert_array_equal(result[0, :, 1], 0)
    assert (result[0, :, 0] != 0).all()
    assert np.isnan(result[0]).tolist() == [[False, False, True]] * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("patches", "classes"), [(131, 67), (131, 3), (0, 3)])
def test_finite_tells_of_the_result_every_time(device, dtype, patches, classes):
    patch_embeds = random_embeds(2, patches, 64, dtype=dtype)
    broken = patch_embeds.copy()
    broken[-1:, -1:, -1:] = np.inf
    text_embeds = device.place(random_embeds(classes, 64, dtype=dtype))
    workspace = device.place(np.zeros(8, np.uint8))
    for embeds in (patch_embeds, broken, patch_embeds):
        finite = device.poisoned((1,), np.uint8)
        ops.patch_text_similarity(
            device.place(embeds),
            text_embeds,
            finite=finite,
            workspace=workspace,
            stream=device.stream,
        )
        assert device.fetch(finite)[0] == (embeds is patch_embeds or patches == 0)
        assert not device.fetch(workspace).any()
        law = np.full(1, 7, np.uint8)
        with np.errstate(invalid="ignore"):
            reference.patch_text_similarity(embeds, device.fetch(text_embeds), finite=law)
        assert law[0] == device.fetch(finite)[0]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_finite_on_cuda_needs_a_workspace(device):
    arrays = [device.place(random_embeds(*shape)) for shape in ((1, 3, 8), (2, 8))]
    finite = device.poisoned((1,), np.uint8)
    for workspace in (None, device.place(np.zeros(4, np.uint8))):
        with refused(ArgumentError, "workspace", "8"):
            ops.patch_text_similarity(
                *arrays, finite=finite, workspace=workspace, stream=device.stream
            )


EMULATED = getattr(ctypes.CDLL(_C.__file__), "cuda_emulation_set_multiprocessors", None)


@pytest.fixture
def set_multiprocessors():
    """Sets how many the emulated GPU has; a real one keeps its own."""
    yield EMULATED or (lambda _count: None)
    if EMULATED is not None:
        EMULATED(1)


def similarity_arguments(device, dtype):
    pairs = [Numbers(device, dtype, random_embeds(*shape)) for shape in ((2, 67, 520), (19, 520))]
    return [each.placed for each in pairs], [each.wide for each in pairs]


SHARED = {  # arguments, the result's shape, and its tolerance
    "patch_text_similarity": (similarity_arguments, (2, 19, 67), lambda _: COSINE),
    "relationship_descriptor": (
        lambda device, dtype: descriptor_arguments(device, dtype, 1, 20, 512, 67),
        (1, 20, 67),
        lambda dtype: SUM + 3 * LAST_BIT[dtype],
    ),
}


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [1, 30, 132])
@pytest.mark.parametrize("name", SHARED)
def test_blocks_share_the_depth_and_repeat_their_bits(
    device, set_multiprocessors, dtype, count, name
):
    set_multiprocessors(count)
    arguments, shape, tolerance = SHARED[name]
    placed, wide = arguments(device, dtype)
    workspace = device.place(np.zeros(ops.DEPTH_WORKSPACE_BYTES, np.uint8))
    results = []
    for _ in range(3):
        out = device.poisoned(shape, np.float32)
        getattr(ops, name)(*placed, out=out, workspace=workspace, stream=device.stream)
        results.append(device.fetch(out))
    expected = getattr(reference, name)(*wide)
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=tolerance(dtype))
    for again in results[1:]:
        np.testing.assert_array_equal(again, results[0])
    used = device.fetch(workspace)
    assert not used[:2048].any()
    if EMULATED is not None and name == "patch_text_similarity":
        assert used.any() == (count >= 30)  # there are 2 * 5 tiles


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_workspace_has_to_be_aligned(device):
    placed, _ = descriptor_arguments(device, "float32", 1, 2, 8, 3)
    workspace = device.place(np.zeros(4100, np.uint8))

    class Later:
        """The same memory from its second byte on."""

        @property
        def __cuda_array_interface__(self):
            fields = dict(workspace.__cuda_array_interface__)
            fields["data"] = (fields["data"][0] + 1, False)
            fields["shape"] = (4096,)
            fields["strides"] = None
            return fields

    with refused(ArgumentError, "workspace"):
        ops.relationship_descriptor(*placed, workspace=Later(), stream=device.stream)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("grid", "out_hw"), [((5, 7), (61, 83)), ((9, 8), (4, 5)), ((1, 3), (9, 1))]
)
def test_reference_agrees_with_torch(activation, grid, out_hw):
    torch = pytest.importorskip("torch")
    logits = random_logits(2, 13, *grid)
    values = torch.nn.functional.interpolate(
        torch.from_numpy(logits), size=out_hw, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(
        reference.upsample_bilinear(logits, out_hw), values.numpy(), atol=5e-6
    )
    activate = {"none": lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(1)}
    activated = activate[activation](values)
    seen = some_seen(13)
    lowered = activated - 0.2 * torch.from_numpy(seen)[:, None, None]
    winners = lowered.argmax(1)
    arguments = {"activation": activation, "seen": seen, "seen_bias": 0.2}
    labels, scores = reference.upsample_argmax(logits, out_hw, **arguments, with_scores=True)
    clear = top_two_margin(logits, out_hw, **arguments) > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], winners.numpy()[clear])
    winning = activated.gather(1, winners[:, None])[:, 0].numpy()
    np.testing.assert_allclose(scores[clear], winning[clear], atol=5e-6)


def aligned_bytes(size, offset=0):
    """A host array uint8 [size] that begins ``offset`` bytes past a multiple of 64."""
    memory = np.empty(size + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    return memory[first : first + size]


@pytest.mark.parametrize("unfit", [aligned_bytes(3), aligned_bytes(1 << 20, offset=1)], ids=len)
def test_a_workspace_that_does_not_fit_is_refused(unfit):
    with refused(ShapeError, "workspace"):
        ops.upsample_argmax(random_logits(1, 21, 5, 4), (33, 29), workspace=unfit)


def test_pixels_of_no_class_are_unknown_whatever_the_table_says(device):
    logits = np.full((1, 3, 2, 2), np.nan, np.float32)
    for dtype in (np.uint8, np.uint16):
        arguments = (device.place(logits), (43, 37))
        table = device.place(np.zeros(65536, dtype))
        labels, _ = ops.upsample_argmax(*arguments, label_table=table, stream=device.stream)
        assert (device.fetch(labels) == np.iinfo(dtype).max).all()
    number, logits = device.place(np.array([0], np.int32)), device.place(random_logits(1, 40, 6, 5))
    labels, _ = ops.upsample_argmax(logits, (43, 37), num_classes=number, stream=device.stream)
    assert (device.fetch(labels) == 255).all()  # no class counts


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("value", "counts"), [(-3, 0), (2, 2), (1000, 9)])
def test_on_a_gpu_the_number_is_read_when_the_kernel_runs(device, value, counts):
    """So that a recorded call serves several vocabularies; out of range, the nearest counts."""
    if device.name == "cpu":
        pytest.skip("the CPU reads it at once")
    logits, number = random_logits(2, 9, 6, 5), device.place(np.array([9], np.int32))
    placed = device.place(logits)
    number.copy_from(np.array([value], np.int32), stream=device.stream)
    labels, _ = ops.upsample_argmax(placed, (43, 37), num_classes=number, stream=device.stream)
    expected, _ = reference.upsample_argmax(
        logits, (43, 37), num_classes=np.array([counts], np.int32)
    )
    np.testing.assert_array_equal(device.fetch(labels), expected)


def warp_arguments(size, reach):
    """Flows of up to ``reach`` cells; weights below 0 and above 1 among them."""
    rng = np.random.default_rng(size)
    batch, _, height, width = size
    logits, past = rng.standard_normal((2, *size), np.float32)
    flow = rng.uniform(-reach, reach, (batch, height, width, 2)).astype(np.float32)
    weight = rng.uniform(-0.3, 1.3, (batch, height, width)).astype(np.float32)
    return logits, past, flow, weight


@pytest.mark.parametrize("implementation", [ops, reference], ids=["native", "reference"])
def test_the_edge_is_clamped_for_half_a_cell_and_no_further(implementation):
    logits = np.zeros((1, 1, 1, 6), np.float32)
    past = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 1, 6)
    flow = np.zeros((1, 1, 6, 2), np.float32)
    flow[0, 0, :, 0] = [-0.5, -1.5, -2.51, 2.5, 1.51, np.nan]
    flow[0, 0, 2, 1] = 0.5
    weight = np.ones((1, 1, 6), np.float32)
    moved = implementation.warp_blend(logits, past, flow, weight)
    np.testing.assert_array_equal(moved[0, 0, 0], [1, 1, 0, 6, 0, 0])


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan])
def test_what_does_not_count_is_not_read(device, weight):
    logits, _, flow, weights = warp_arguments((1, 3, 4, 5), 0.3)
    past = np.full_like(logits, np.nan)
    arguments = (logits, past, flow, np.full_like(weights, weight))
    placed = [device.place(argument) for argument in arguments]
    result = ops.warp_blend(*placed, stream=device.stream)
    assert device.holds(result)
    np.testing.assert_array_equal(device.fetch(result), logits)
    np.testing.assert_array_equal(reference.warp_blend(*arguments), logits)


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
    masks, image = smooth_masks(3, 8, 8), random_image(20, 30)
    place = ops.DeviceArray.from_numpy
    wild = np.array([[-9, -9, 99, 99, 1], [40, 50, 3, 2, 1], [5, 6, 5, 6, 1]], np.int32)
    tame = np.array([[0, 0, 30, 20], [29, 19, 30, 20], [5, 6, 6, 7]], np.int32)
    regions, inside = np.array([-7, 1, 2, 99], np.int32), np.array([0, 1, 2, 2], np.int32)
    crops = ops.crop_regions(place(image), place(masks), place(regions), place(wild), side=9)
    expected = reference.crop_regions(image, masks, inside, tame[inside], side=9)
    np.testing.assert_allclose(crops.numpy(), expected, rtol=0, atol=CROP)
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
        np.testing.assert_allclose(crop, expected, rtol=0, atol=CROP)


@pytest.mark.usefixtures("cpu_isa")
def test_planes_may_have_rows_apart():
    luma, chroma = nv12_frame(48, 66)
    labels = np.zeros((48, 66), np.uint8)
    wide = np.zeros((48, 700), np.uint8)
    wide[:, :66] = luma
    palette = np.uint8([[9, 200, 30]])
    drawn = ops.overlay((wide[:, :66], chroma), labels, palette)
    np.testing.assert_array_equal(drawn, reference.overlay((luma, chroma), labels, palette))
    image = ops.preprocess((wide[:, :66], chroma), size_hw=(20, 30), **CLIP)
    np.testing.assert_array_equal(image, ops.preprocess((luma, chroma), size_hw=(20, 30), **CLIP))
    for frame in ((wide[:, :66], chroma), (luma, chroma)):
        law = reference.preprocess(frame, size_hw=(20, 30), **CLIP)
        np.testing.assert_allclose(image, law, atol=4e-6)


def test_windows_are_added_to_what_is_there(device):
    logits = random_embeds(2, 9, 4, 5)
    shares, places = np.abs(random_embeds(7, 9)), [(0, 0), (3, 4)]
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
    logits, (luma, chroma) = place(random_logits(1, 4, 3, 3)), nv12_frame(4, 6)
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
        image, weights = place(random_frame(4, 5)), place(np.zeros((1, 2, 2), np.uint8))
        ops.ink(image, weights, (0, 0), [(1, 2, 3)])
