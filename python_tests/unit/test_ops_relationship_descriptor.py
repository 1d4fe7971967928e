"""relationship_descriptor and its text half: the law is ops.reference."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import DTypeError, ShapeError
from zsseg_rt.ops import reference

# 1024-term float32 sums of unit-variance terms scaled to a variance of about 2: worst seen 3e-6.
TOLERANCE = 1e-5


def random_arguments(batch, classes, embed_dim, outputs):
    rng = np.random.default_rng(batch + 10 * classes + 100 * embed_dim)
    weight = rng.standard_normal((outputs, 2 * embed_dim)) / np.sqrt(embed_dim)
    arrays = (
        rng.standard_normal((batch, embed_dim)),
        rng.standard_normal((classes, embed_dim)),
        weight,
        rng.standard_normal(outputs),
    )
    return tuple(array.astype(np.float32) for array in arrays)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("classes", [0, 1, 67, 171])
@pytest.mark.parametrize(("embed_dim", "outputs"), [(1, 1), (31, 65), (512, 37)])
def test_matches_reference(device, batch, classes, embed_dim, outputs):
    arguments = random_arguments(batch, classes, embed_dim, outputs)
    placed = [device.place(argument) for argument in arguments]
    out = ops.relationship_descriptor(*placed, stream=device.stream)
    assert device.holds(out)
    expected = reference.relationship_descriptor(*arguments)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("classes", [0, 1, 67])
@pytest.mark.parametrize(("embed_dim", "outputs"), [(1, 1), (31, 65), (512, 37)])
def test_text_half_computed_before(device, classes, embed_dim, outputs):
    arguments = random_arguments(2, classes, embed_dim, outputs)
    placed = [device.place(argument) for argument in arguments]
    queries = device.poisoned((classes, outputs), np.float32)
    assert (
        ops.relationship_descriptor_text(*placed[1:], out=queries, stream=device.stream) is queries
    )
    expected = reference.relationship_descriptor_text(*arguments[1:])
    np.testing.assert_allclose(device.fetch(queries), expected, rtol=0, atol=TOLERANCE)

    out = device.poisoned((2, classes, outputs), np.float32)
    ops.relationship_descriptor(*placed, text_queries=queries, out=out, stream=device.stream)
    assert device.holds(out)
    expected = reference.relationship_descriptor(*arguments)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
def test_every_instruction_set_and_thread_count():
    arguments = random_arguments(2, 171, 133, 259)
    out = ops.relationship_descriptor(*arguments)
    expected = reference.relationship_descriptor(*arguments)
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def zeros(*shape):
    return np.zeros(shape, np.float32)


GOOD = {
    "cls_embed": zeros(1, 4),
    "text_embeds": zeros(3, 4),
    "weight": zeros(5, 8),
    "bias": zeros(5),
}
BAD = [
    ({"cls_embed": zeros(1, 3)}, ShapeError, "cls_embed"),
    ({"text_embeds": zeros(4)}, ShapeError, "text_embeds"),
    ({"weight": zeros(5, 4)}, ShapeError, "weight"),
    ({"weight": zeros(8, 5).T}, ShapeError, "weight"),
    ({"bias": zeros(4)}, ShapeError, "bias"),
    ({"bias": np.zeros(5)}, DTypeError, "bias"),
    ({"text_queries": zeros(3, 4)}, ShapeError, "text_queries"),
    ({"out": zeros(3, 5)}, ShapeError, "out"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.relationship_descriptor(**{**GOOD, **change})
