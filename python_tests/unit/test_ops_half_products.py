"""float16 and bfloat16 inputs of the two products, and blocks that share their depth.

The law is ops.reference on the same numbers as float32.
"""

import ctypes

import numpy as np
import pytest

from conftest import CpuDevice
from support.bfloat16 import Bfloat16Array, bfloat16_bits, widened
from support.errors import refused
from zsseg_rt import _C, ops
from zsseg_rt.errors import ArgumentError, DTypeError
from zsseg_rt.ops import reference

# 512-term float32 sums, as in the tests of each operation.
COSINE_TOLERANCE = 1e-6
SUM_TOLERANCE = 1e-5
# On CUDA, cls * text is rounded to 11 or 8 bits: half of the last bit of each of the terms, whose
# signs are random and whose squares sum to 1 here, moves a result by 3 to 4 of these in the worst
# of thousands. A result of that dtype is rounded once more, and is below 8.
LAST_BIT = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class Numbers:
    """Random numbers that a dtype holds, as float32 and as an array of that dtype on a device."""

    def __init__(self, device, dtype, values):
        if dtype == "bfloat16":
            bits = bfloat16_bits(values)
            self.wide, self.placed = widened(bits), Bfloat16Array(device.place(bits))
        else:
            narrow = values.astype(dtype)
            self.wide, self.placed = narrow.astype(np.float32), device.place(narrow)


@pytest.fixture
def cpu():
    return CpuDevice()


def random_values(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def descriptor_arguments(device, dtype, batch, classes, embed_dim, outputs):
    weight = random_values(outputs, 2 * embed_dim) / np.sqrt(embed_dim)
    halves = (random_values(batch, embed_dim), random_values(classes, embed_dim), weight)
    numbers = [Numbers(device, dtype, values) for values in halves]
    bias = random_values(outputs)
    return [each.placed for each in numbers] + [device.place(bias)], [
        *(each.wide for each in numbers),
        bias,
    ]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("embed_dim", [31, 512])
@pytest.mark.parametrize(
    ("patch", "text"),
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
def test_similarity_of_bfloat16(device, patch, text, embed_dim, normalize):
    patches = Numbers(device, patch, random_values(2, 67, embed_dim))
    classes = Numbers(device, text, random_values(37, embed_dim))
    out = device.poisoned((2, 37, 67), np.float32)
    ops.patch_text_similarity(
        patches.placed, classes.placed, normalize=normalize, out=out, stream=device.stream
    )
    expected = reference.patch_text_similarity(patches.wide, classes.wide, normalize=normalize)
    tolerance = COSINE_TOLERANCE if normalize else 100 * COSINE_TOLERANCE
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("classes", [1, 67])
@pytest.mark.parametrize(("embed_dim", "outputs"), [(1, 1), (31, 65), (512, 37)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_descriptor_of_half_inputs(device, dtype, batch, classes, embed_dim, outputs):
    placed, wide = descriptor_arguments(device, dtype, batch, classes, embed_dim, outputs)
    queries = device.poisoned((classes, outputs), np.float32)
    ops.relationship_descriptor_text(*placed[1:], out=queries, stream=device.stream)
    text_half = reference.relationship_descriptor_text(*wide[1:])
    np.testing.assert_allclose(device.fetch(queries), text_half, rtol=0, atol=SUM_TOLERANCE)

    expected = reference.relationship_descriptor(*wide)
    tolerance = SUM_TOLERANCE
    if device.name != "cpu":
        tolerance += (3 if embed_dim > 1 else 20) * LAST_BIT[dtype]
    for text_queries in (None, queries):
        out = device.poisoned((batch, classes, outputs), np.float32)
        ops.relationship_descriptor(
            *placed, text_queries=text_queries, out=out, stream=device.stream
        )
        np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_descriptor_to_half(device, dtype):
    placed, wide = descriptor_arguments(device, dtype, 2, 40, 96, 37)
    bits = device.poisoned((2, 40, 37), np.uint16)
    if dtype == "float16":
        half = device.poisoned((2, 40, 37), np.float16)
        ops.relationship_descriptor(*placed, out=half, stream=device.stream)
        result = device.fetch(half).astype(np.float32)
    else:
        ops.relationship_descriptor(*placed, out=Bfloat16Array(bits), stream=device.stream)
        result = widened(device.fetch(bits))
    expected = reference.relationship_descriptor(*wide)
    tolerance = (3 if device.name != "cpu" else 0) * LAST_BIT[dtype] + SUM_TOLERANCE
    np.testing.assert_allclose(result, expected, rtol=LAST_BIT[dtype], atol=tolerance)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("classes", [5, 171])
def test_every_instruction_set_and_thread_count(cpu, dtype, classes):
    placed, wide = descriptor_arguments(cpu, dtype, 2, classes, 133, 77)
    np.testing.assert_allclose(
        ops.relationship_descriptor(*placed),
        reference.relationship_descriptor(*wide),
        rtol=0,
        atol=SUM_TOLERANCE,
    )
    patches = Numbers(cpu, dtype, random_values(2, 67, 133))
    np.testing.assert_allclose(
        ops.patch_text_similarity(patches.placed, placed[1]),
        reference.patch_text_similarity(patches.wide, wide[1]),
        rtol=0,
        atol=COSINE_TOLERANCE,
    )


def test_the_definition_takes_float16_too():
    arrays = [random_values(*shape).astype(np.float16) for shape in ((2, 8), (3, 8), (5, 16))]
    bias = random_values(5)
    wide = reference.relationship_descriptor(*(a.astype(np.float32) for a in arrays), bias)
    np.testing.assert_array_equal(reference.relationship_descriptor(*arrays, bias), wide)
    half = reference.relationship_descriptor(*arrays, bias, out=np.empty((2, 3, 5), np.float16))
    np.testing.assert_array_equal(half, wide.astype(np.float16))


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (("float32", "float16", "float16"), "cls_embed"),
        (("float16", "float16", "float32"), "weight"),
        (("bfloat16", "bfloat16", "float16"), "weight"),
    ],
)
def test_descriptor_refuses_mixed_dtypes(cpu, dtypes, message):
    shapes = ((1, 4), (3, 4), (5, 8))
    arrays = [
        Numbers(cpu, dtype, random_values(*shape)).placed
        for dtype, shape in zip(dtypes, shapes, strict=True)
    ]
    with refused(DTypeError, message):
        ops.relationship_descriptor(*arrays, random_values(5))


def test_float16_does_not_meet_bfloat16(cpu):
    patches = random_values(1, 3, 4).astype(np.float16)
    text = Numbers(cpu, "bfloat16", random_values(5, 4)).placed
    with refused(DTypeError, "text_embeds"):
        ops.patch_text_similarity(patches, text)


EMULATED = getattr(ctypes.CDLL(_C.__file__), "cuda_emulation_set_multiprocessors", None)


@pytest.fixture
def set_multiprocessors():
    """Sets how many the emulated GPU has; a real one keeps its own."""
    yield EMULATED or (lambda _count: None)
    if EMULATED is not None:
        EMULATED(1)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [1, 30, 132])
def test_blocks_share_the_depth_and_repeat_their_bits(device, set_multiprocessors, dtype, count):
    set_multiprocessors(count)
    patches = Numbers(device, dtype, random_values(2, 67, 520))
    classes = Numbers(device, dtype, random_values(19, 520))
    workspace = device.place(np.zeros(ops.DEPTH_WORKSPACE_BYTES, np.uint8))
    results = []
    for _ in range(4):
        out = device.poisoned((2, 19, 67), np.float32)
        finite = device.poisoned((1,), np.uint8)
        ops.patch_text_similarity(
            patches.placed,
            classes.placed,
            out=out,
            finite=finite,
            workspace=workspace,
            stream=device.stream,
        )
        results.append(device.fetch(out))
        assert device.fetch(finite)[0] == 1
    expected = reference.patch_text_similarity(patches.wide, classes.wide)
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=COSINE_TOLERANCE)
    for again in results[1:]:
        np.testing.assert_array_equal(again, results[0])
    used = device.fetch(workspace)
    assert not used[:2048].any()
    if EMULATED is not None:
        assert used.any() == (count >= 30)  # there are 2 * 5 tiles


@pytest.mark.needs_cuda
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_descriptor_s_blocks_share_the_depth(device, set_multiprocessors, dtype):
    placed, wide = descriptor_arguments(device, dtype, 1, 20, 512, 67)
    expected = reference.relationship_descriptor(*wide)
    workspace = device.place(np.zeros(ops.DEPTH_WORKSPACE_BYTES, np.uint8))
    for count in (7, 12, 132):
        set_multiprocessors(count)
        results = []
        for _ in range(3):
            out = device.poisoned((1, 20, 67), np.float32)
            ops.relationship_descriptor(*placed, out=out, workspace=workspace, stream=device.stream)
            results.append(device.fetch(out))
        tolerance = SUM_TOLERANCE + 3 * LAST_BIT[dtype]
        np.testing.assert_allclose(results[0], expected, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(results[1], results[0])
        np.testing.assert_array_equal(results[2], results[0])
        assert not device.fetch(workspace)[:2048].any()


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
