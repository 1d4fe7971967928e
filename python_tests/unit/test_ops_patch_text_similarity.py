"""patch_text_similarity: the law is ops.reference.patch_text_similarity."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference

# 512-term float32 dots of unit rows; for raw rows scaled by their norms' product, about 512. Worst
# seen: 6.1e-5 for raw rows, by the CUDA kernel's arithmetic (emulated), which adds term after term.
COSINE_TOLERANCE = 1e-6
RAW_TOLERANCE = 1e-4


def random_embeds(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("classes", [0, 1, 67])
@pytest.mark.parametrize("patches", [0, 1, 131])
@pytest.mark.parametrize("embed_dim", [1, 31, 512])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_matches_reference(device, classes, patches, embed_dim, dtype, normalize):
    patch_embeds = random_embeds(2, patches, embed_dim, dtype=dtype)
    text_embeds = random_embeds(classes, embed_dim, dtype=dtype)
    settings = {"logit_scale": 2.5, "normalize": normalize}
    out = ops.patch_text_similarity(
        device.place(patch_embeds), device.place(text_embeds), stream=device.stream, **settings
    )
    assert device.holds(out)
    result = device.fetch(out)
    assert result.dtype == np.float32
    expected = reference.patch_text_similarity(patch_embeds, text_embeds, **settings)
    tolerance = 2.5 * (COSINE_TOLERANCE if normalize else RAW_TOLERANCE)
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtypes", [(np.float16, np.float32), (np.float32, np.float16)])
def test_dtypes_may_differ_and_classes_may_differ_by_image(device, dtypes):
    patch_embeds = random_embeds(3, 67, 33, dtype=dtypes[0])
    text_embeds = random_embeds(3, 5, 33, dtype=dtypes[1])
    out = device.poisoned((3, 5, 67), np.float32)
    result = ops.patch_text_similarity(
        device.place(patch_embeds), device.place(text_embeds), out=out, stream=device.stream
    )
    assert result is out
    assert device.holds(out)
    expected = reference.patch_text_similarity(patch_embeds, text_embeds)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=COSINE_TOLERANCE)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_instruction_set_and_thread_count(dtype):
    patch_embeds = random_embeds(2, 517, 133, dtype=dtype)
    text_embeds = random_embeds(171, 133, dtype=dtype)
    out = ops.patch_text_similarity(patch_embeds, text_embeds)
    expected = reference.patch_text_similarity(patch_embeds, text_embeds)
    np.testing.assert_allclose(out, expected, rtol=0, atol=COSINE_TOLERANCE)


@pytest.mark.usefixtures("cpu_isa")
def test_subnormal_and_infinite_float16_are_read_exactly():
    patch_embeds = np.array([6e-8, 6e-5, 65504, 2e-5, -6e-8, 1, 2, 3, 4], np.float16)
    identity = np.eye(9, dtype=np.float16)
    out = ops.patch_text_similarity(patch_embeds.reshape(1, 1, 9), identity, normalize=False)
    np.testing.assert_array_equal(out[0, :, 0], patch_embeds.astype(np.float32))


def test_rows_of_zeros_are_similar_to_nothing(device):
    patch_embeds = random_embeds(1, 3, 8)
    patch_embeds[0, 1] = 0
    out = ops.patch_text_similarity(
        device.place(patch_embeds), device.place(random_embeds(2, 8)), stream=device.stream
    )
    assert device.holds(out)
    result = device.fetch(out)
    np.testing.assert_array_equal(result[0, :, 1], 0)
    assert (result[0, :, 0] != 0).all()


def test_nan_stays_nan(device):
    patch_embeds = random_embeds(1, 2, 8)
    patch_embeds[0, 1, 3] = np.nan
    out = ops.patch_text_similarity(
        device.place(patch_embeds), device.place(random_embeds(2, 8)), stream=device.stream
    )
    assert np.isnan(device.fetch(out)[0]).tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("dtypes", [(np.float16, np.float16), (np.float32, np.float16)])
@pytest.mark.parametrize("classes", [5, 40])
def test_classes_can_come_last(device, dtypes, classes):
    patch_embeds = random_embeds(2, 67, 64, dtype=dtypes[0])
    text_embeds = random_embeds(classes, 64, dtype=dtypes[1])
    out = device.poisoned((2, 67, classes), np.float32)
    result = ops.patch_text_similarity(
        device.place(patch_embeds),
        device.place(text_embeds),
        classes_last=True,
        out=out,
        stream=device.stream,
    )
    assert result is out
    expected = reference.patch_text_similarity(patch_embeds, text_embeds)
    np.testing.assert_allclose(
        device.fetch(out), expected.transpose(0, 2, 1), rtol=0, atol=COSINE_TOLERANCE
    )
    law = reference.patch_text_similarity(patch_embeds, text_embeds, classes_last=True)
    np.testing.assert_array_equal(law, expected.transpose(0, 2, 1))


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


def test_the_same_call_gives_the_same_bits(device):
    arrays = [device.place(random_embeds(*shape)) for shape in ((1, 131, 200), (67, 200))]
    first, second = (
        device.fetch(ops.patch_text_similarity(*arrays, stream=device.stream)) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


GOOD = {"patch_embeds": random_embeds(2, 3, 4), "text_embeds": random_embeds(5, 4)}
BAD = [
    ({"patch_embeds": random_embeds(3, 4)}, ShapeError, "patch_embeds"),
    ({"text_embeds": random_embeds(5, 3)}, ShapeError, "text_embeds"),
    ({"text_embeds": random_embeds(3, 5, 4)}, ShapeError, "text_embeds"),
    (
        {"text_embeds": np.zeros((5, 4))},
        DTypeError,
        "text_embeds",
    ),
    ({"logit_scale": float("inf")}, ArgumentError, "logit_scale"),
    ({"finite": np.zeros(2, np.uint8)}, ShapeError, "finite"),
    ({"finite": np.zeros(1, bool)}, DTypeError, "finite"),
    ({"out": np.zeros((2, 5, 3), np.float16)}, DTypeError, "out"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.patch_text_similarity(**{**GOOD, **change})
