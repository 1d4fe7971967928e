"""Each pattern that backend torch rewrites for GPUs: what matches, and what must stay."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from onnx import TensorProto  # noqa: E402

from support.graphs import write_graph  # noqa: E402
from support.patterns import FLOAT, HALF, check, node, weights  # noqa: E402
from zsseg_rt.backends._torch_graph.program import Program  # noqa: E402
from zsseg_rt.errors import BackendError  # noqa: E402

HEADS, ROWS, WIDTH = 2, 5, 8

HEAD = [1, HEADS, ROWS, WIDTH]
QKV = dict.fromkeys("qkv", (FLOAT, HEAD))
RESULT = {"y": (FLOAT, HEAD)}


def attention(mask=False, scale=True, softmax_axis=-1):
    """As exporters write it: the root of the scale on both sides, K turned in three steps."""
    yield node("Reshape", "k rows", "k3")
    yield node("Transpose", "k3", "k3t", perm=[0, 2, 1])
    yield node("Reshape", "k3t columns", "kt")
    if scale:
        yield node("Mul", "q root", "qs")
        yield node("Mul", "kt root", "ks")
    yield node("MatMul", "qs ks" if scale else "q kt", "scores")
    if mask:
        yield node("Add", "scores mask", "masked")
    yield node("Softmax", "masked" if mask else "scores", "shares", axis=softmax_axis)
    yield node("MatMul", "shares v", "y")


def shapes(**more):
    held = {"rows": [-1, ROWS, WIDTH], "columns": [1, HEADS, WIDTH, ROWS]}
    return {n: np.array(sizes) for n, sizes in held.items()} | more


ROOT = np.array([WIDTH**-0.25], np.float32)


@pytest.mark.parametrize("scale", [True, False])
def test_attention_is_fused(tmp_path, scale):
    constants = shapes(root=ROOT) if scale else shapes()
    counts, left = check(tmp_path, [*attention(scale=scale)], QKV, RESULT, constants)
    assert counts["fused_attention"] == 1
    assert left == ["Reshape", "Transpose", "Reshape", "SwapLastAxes", "FusedAttention"]


@pytest.mark.parametrize("shape", [(ROWS, ROWS), (1, 1, ROWS, ROWS), (1, ROWS)])
def test_constant_scores_are_its_mask(tmp_path, shape):
    mask = weights(*shape)
    mask[..., 1] = -np.inf
    constants = shapes(root=ROOT, mask=mask)
    counts, left = check(tmp_path, [*attention(mask=True)], QKV, RESULT, constants)
    assert counts["fused_attention"] == 1
    assert "Add" not in left


@pytest.mark.parametrize("shape", [(ROWS,), (1, HEADS, ROWS, ROWS)])
def test_other_constants_are_left_to_an_add(tmp_path, shape):
    """Fused kernels take a mask for all heads."""
    constants = shapes(root=ROOT, mask=weights(*shape))
    counts, left = check(tmp_path, [*attention(mask=True)], QKV, RESULT, constants)
    assert counts["fused_attention"] == 0
    assert "Softmax" in left


def test_a_softmax_over_another_axis_is_no_attention(tmp_path):
    nodes = [*attention(softmax_axis=2)]
    counts, left = check(tmp_path, nodes, QKV, RESULT, shapes(root=ROOT))
    assert counts["fused_attention"] == 0
    assert left == [made.op_type for made in nodes]


@pytest.mark.parametrize("kept", ["shares", "scores"])
def test_attention_whose_inside_is_a_result_is_left(tmp_path, kept):
    outputs = RESULT | {kept: (FLOAT, [1, HEADS, ROWS, ROWS])}
    counts, _ = check(tmp_path, [*attention()], QKV, outputs, shapes(root=ROOT))
    assert counts["fused_attention"] == 0


def test_attention_without_a_batch_is_fused(tmp_path):
    """As [heads, rows, width]."""
    inputs = dict.fromkeys("qkv", (FLOAT, HEAD[1:]))
    nodes = [
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "scores"),
        node("Softmax", "scores", "shares", axis=-1),
        node("MatMul", "shares v", "y"),
    ]
    counts, _ = check(tmp_path, nodes, inputs, {"y": (FLOAT, HEAD[1:])}, {})
    assert counts["fused_attention"] == 1


X = {"x": (FLOAT, [1, ROWS, WIDTH])}
Y = {"y": (FLOAT, [1, ROWS, 6])}


@pytest.mark.parametrize("order", ["h b", "b h"])
def test_a_product_and_its_bias_are_one(tmp_path, order):
    nodes = [node("MatMul", "x w", "h"), node("Add", order, "y")]
    counts, left = check(tmp_path, nodes, X, Y, {"w": weights(WIDTH, 6), "b": weights(6)})
    assert counts["fused_linear"] == 1
    assert left == ["Linear"]


@pytest.mark.parametrize("shape", [(1, ROWS, 6), (1,)])
def test_an_addition_that_is_no_bias_is_left(tmp_path, shape):
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b", "y")]
    counts, left = check(tmp_path, nodes, X, Y, {"w": weights(WIDTH, 6), "b": weights(*shape)})
    assert counts["fused_linear"] == 0
    assert left == ["MatMul", "Add"]


def test_products_of_the_same_rows_are_merged(tmp_path):
    nodes, outputs, held = [], {}, {}
    for name, width in (("q", 4), ("k", 6), ("v", 3)):
        nodes += [node("MatMul", f"x w{name}", f"h{name}"), node("Add", f"h{name} b{name}", name)]
        outputs[name] = (FLOAT, [1, ROWS, width])
        held |= {f"w{name}": weights(WIDTH, width), f"b{name}": weights(width)}
    counts, left = check(tmp_path, nodes, X, outputs, held)
    assert counts["merged_linear"] == 1
    assert left == ["Linear", "Parts"]


PROMPTS = 3


def prompted(order="{} prompts_{}", batch=1):
    """Queries, keys and values of the same rows, by heads; constants behind the last two."""
    nodes, held = [], {"heads": np.array([batch, -1, HEADS, WIDTH // HEADS])}
    for name in "qkv":
        nodes += [node("MatMul", f"x w{name}", f"p{name}"), node("Add", f"p{name} b{name}", name)]
        to = f"{name}t" if name in "kv" else "Q"
        nodes += [node("Reshape", f"{name} heads", f"{name}r")]
        nodes += [node("Transpose", f"{name}r", to, perm=[0, 2, 1, 3])]
        held |= {f"w{name}": weights(WIDTH, WIDTH), f"b{name}": weights(WIDTH)}
        if name in "kv":
            nodes.append(node("Concat", order.format(to, name), name.upper(), axis=2))
            held[f"prompts_{name}"] = weights(batch, HEADS, PROMPTS, WIDTH // HEADS)
    behind = (FLOAT, [batch, HEADS, ROWS + PROMPTS, WIDTH // HEADS])
    outputs = {"Q": (FLOAT, [batch, HEADS, ROWS, WIDTH // HEADS]), "K": behind, "V": behind}
    return nodes, {"x": (FLOAT, [batch, ROWS, WIDTH])}, outputs, held


def test_constant_keys_and_values_are_written_once(tmp_path):
    counts, left = check(tmp_path, *prompted())
    assert counts["extended_linear"] == 1
    to_heads = ["Reshape", "Transpose"]
    assert left == ["ExtendedLinear", "Parts", "DropRows", *to_heads, *to_heads, *to_heads]


@pytest.mark.parametrize("settings", [{"order": "prompts_{1} {0}"}, {"batch": 2}])
def test_constants_that_are_not_the_last_rows_are_left(tmp_path, settings):
    counts, left = check(tmp_path, *prompted(**settings))
    assert counts["extended_linear"] == 0
    assert left.count("Concat") == 2


def test_a_part_that_is_also_read_without_its_constants_is_left(tmp_path):
    nodes, inputs, outputs, held = prompted()
    outputs["kt"] = outputs["Q"]
    counts, left = check(tmp_path, nodes, inputs, outputs, held)
    assert counts["extended_linear"] == 1  # the values'
    assert left.count("Concat") == 1


@pytest.mark.parametrize("kept", [False, True])
def test_a_relu_is_part_of_a_product_that_nothing_else_reads(tmp_path, kept):
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "h"), node("Relu", "h", "y")]
    outputs = Y | ({"h": Y["y"]} if kept else {})
    held = {"w": weights(WIDTH, 6), "b": weights(6)}
    counts, left = check(tmp_path, nodes, X, outputs, held)
    assert counts["fused_relu"] == (not kept)
    assert left == (["Linear", "Relu"] if kept else ["LinearRelu"])


@pytest.mark.parametrize("kept", [False, True])
def test_rows_of_half_precision_are_made_unit_at_once(tmp_path, kept):
    nodes = [
        node("Cast", "x", "wide", to=FLOAT),
        node("ReduceL2", "wide axes", "norm", keepdims=1),
        node("Div", "wide norm", "unit"),
        node("Cast", "unit", "y", to=HALF),
    ]
    inputs, outputs = {"x": (HALF, [1, ROWS, WIDTH])}, {"y": (HALF, [1, ROWS, WIDTH])}
    outputs |= {"norm": (FLOAT, [1, ROWS, 1])} if kept else {}
    held = {"axes": np.array([-1])}
    counts, left = check(tmp_path, nodes, inputs, outputs, held, tolerance=0)
    assert counts["fused_unit"] == (not kept)
    assert left == (["Cast", "ReduceL2", "Div", "Cast"] if kept else ["Unit"])


@pytest.mark.parametrize("axis", [-1, 1])
def test_rows_of_float32_are_made_unit_at_once(tmp_path, axis):
    """Also where they lie one behind another's values."""
    nodes = [
        node("Transpose", "x", "turned", perm=[0, 2, 1]),
        node("ReduceL2", "turned axes", "norm", keepdims=1),
        node("Div", "turned norm", "y"),
    ]
    inputs, outputs = {"x": (FLOAT, [1, ROWS, WIDTH])}, {"y": (FLOAT, [1, WIDTH, ROWS])}
    counts, left = check(tmp_path, nodes, inputs, outputs, {"axes": np.array([axis])})
    assert counts["fused_unit"] == (axis == -1)
    assert left == ["Transpose", *(["Unit"] if axis == -1 else ["ReduceL2", "Div"])]


RESIDUAL = {"a": (FLOAT, [1, ROWS, WIDTH]), "b": (FLOAT, [1, ROWS, WIDTH])}
NORMED = {"y": (FLOAT, [1, ROWS, WIDTH])}
WEIGHTS = {name: weights(WIDTH) for name in ("scale", "shift", "scale_2")}


def sum_and_norms(kind=FLOAT, second=False):
    """As in a residual block; in half precision with the casts around it."""
    yield node("Add", "a b", "sum")
    if kind == HALF:
        yield node("Cast", "sum", "wide", to=FLOAT)
    rows, to = ("wide", "normed") if kind == HALF else ("sum", "y")
    first = "inner" if second else to
    yield node("LayerNormalization", f"{rows} scale shift", first, epsilon=1e-4)
    if second:
        yield node("LayerNormalization", "inner scale_2", to)
    if kind == HALF:
        yield node("Cast", "normed", "y", to=HALF)


@pytest.mark.parametrize("kind", [FLOAT, HALF])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_sum_and_its_norms_are_one(tmp_path, kind, second, kept):
    nodes = [*sum_and_norms(kind, second)]
    inputs = {name: (kind, shape) for name, (_, shape) in RESIDUAL.items()}
    outputs = {"y": (kind, NORMED["y"][1])} | ({"sum": (kind, [1, ROWS, WIDTH])} if kept else {})
    tolerance = 2e-5 if kind == FLOAT else 4e-3  # of numbers up to 5, rounded once
    counts, left = check(tmp_path, nodes, inputs, outputs, WEIGHTS, tolerance=tolerance)
    assert counts["fused_add_norm"] == 1
    assert left == ["AddNorm"]


@pytest.mark.parametrize("shape", [[ROWS, WIDTH], [1, 1, WIDTH], [WIDTH]])
def test_a_sum_that_is_spread_is_normalised_too(tmp_path, shape):
    inputs = RESIDUAL | {"b": (FLOAT, shape)}
    counts, _ = check(tmp_path, [*sum_and_norms()], inputs, NORMED, WEIGHTS, tolerance=2e-5)
    assert counts["fused_add_norm"] == 1


def test_a_norm_over_two_axes_or_of_a_constants_sum_is_left(tmp_path):
    held = {"scale": weights(ROWS, WIDTH), "shift": weights(ROWS, WIDTH), "b": weights(ROWS, WIDTH)}
    nodes = [node("Add", "a a", "sum")]
    nodes.append(node("LayerNormalization", "sum scale shift", "y", axis=-2))
    inputs = {"a": RESIDUAL["a"]}
    counts, _ = check(tmp_path, nodes, inputs, NORMED, held, tolerance=2e-5)
    assert counts["fused_add_norm"] == 0
    nodes = [node("Add", "a b", "sum"), node("LayerNormalization", "sum one", "y")]
    held = {"one": np.ones(WIDTH, np.float32), "b": weights(ROWS, WIDTH)}
    counts, _ = check(tmp_path, nodes, inputs, NORMED, held, tolerance=2e-5)
    assert counts["fused_add_norm"] == 0


def test_half_rows_whose_norm_is_read_wide_are_left(tmp_path):
    nodes = [*sum_and_norms(HALF)][:-1]
    inputs = {name: (HALF, shape) for name, (_, shape) in RESIDUAL.items()}
    outputs = {"normed": (FLOAT, [1, ROWS, WIDTH])}
    counts, _ = check(tmp_path, nodes, inputs, outputs, WEIGHTS)
    assert counts["fused_add_norm"] == 0


def quick_gelu():
    yield from (node("MatMul", "x w1", "p"), node("Add", "p b1", "h"))
    yield from (node("Mul", "h c", "s"), node("Sigmoid", "s", "g"), node("Mul", "h g", "a"))
    yield from (node("MatMul", "a w2", "o"), node("Add", "o b2", "y"))


def mlp(dtype=np.float32, factor=1.702):
    return {
        "w1": weights(WIDTH, 16, dtype=dtype),
        "b1": weights(16, dtype=dtype),
        "c": np.array(factor, dtype),
        "w2": weights(16, 6, dtype=dtype),
        "b2": weights(6, dtype=dtype),
    }


@pytest.mark.parametrize("kind", [FLOAT, HALF])
def test_quick_gelu_is_silu_between_scaled_weights(tmp_path, kind):
    dtype = np.float32 if kind == FLOAT else np.float16
    inputs, outputs = {"x": (kind, X["x"][1])}, {"y": (kind, Y["y"][1])}
    tolerance = 1e-5 if kind == FLOAT else 2e-2  # the scaled weights are rounded once more
    nodes = [*quick_gelu()]
    counts, left = check(tmp_path, nodes, inputs, outputs, mlp(dtype), tolerance=tolerance)
    assert counts["quick_gelu"] == 1
    assert left == ["Linear", "Silu", "Linear"]


def test_weights_that_others_read_are_not_scaled_for_them(tmp_path):
    nodes = [*quick_gelu(), node("MatMul", "x w1", "other")]
    outputs = Y | {"other": (FLOAT, [1, ROWS, 16])}
    counts, _ = check(tmp_path, nodes, X, outputs, mlp())
    assert counts["quick_gelu"] == 1


@pytest.mark.parametrize("kept", ["h", "a", "g"])
def test_a_gelu_whose_inside_is_a_result_is_left(tmp_path, kept):
    outputs = Y | {kept: (FLOAT, [1, ROWS, 16])}
    counts, left = check(tmp_path, [*quick_gelu()], X, outputs, mlp())
    assert counts["quick_gelu"] == 0
    assert "Sigmoid" in left


def test_a_gate_of_other_rows_is_left(tmp_path):
    """``x * sigmoid(c h)`` is not ``silu``."""
    nodes = [made for made in quick_gelu() if list(made.output) != ["a"]]
    nodes.insert(4, node("Mul", "other g", "a"))
    inputs = X | {"other": (FLOAT, [1, ROWS, 16])}
    counts, _ = check(tmp_path, nodes, inputs, Y, mlp())
    assert counts["quick_gelu"] == 0


NORM = {"scale": weights(WIDTH), "shift": weights(WIDTH)}


def casts_around(op_type, more=""):
    yield node("Cast", "x", "wide", to=FLOAT)
    yield node(op_type, f"wide{more}", "normed")
    yield node("Cast", "normed", "y", to=HALF)


@pytest.mark.parametrize("op_type", ["LayerNormalization", "Softmax"])
def test_casts_around_norms_are_dropped(tmp_path, op_type):
    held = NORM if op_type == "LayerNormalization" else {}
    nodes = [*casts_around(op_type, " scale shift" if held else "")]
    kind = {"x": (HALF, [2, WIDTH])}
    counts, left = check(tmp_path, nodes, kind, {"y": (HALF, [2, WIDTH])}, held, tolerance=4e-3)
    assert counts["dropped_casts"] == 1
    assert left == [op_type]


def test_a_norm_of_float32_stays_so(tmp_path):
    """The first Cast changes nothing: dropped, the norm would round its input."""
    counts, left = check(
        tmp_path, [*casts_around("Softmax")], {"x": (FLOAT, [2, 8])}, {"y": (HALF, [2, 8])}, {}
    )
    assert counts["dropped_casts"] == 0
    assert left == ["Cast", "Softmax", "Cast"]


def test_a_norm_that_is_also_read_wide_stays_so(tmp_path):
    nodes = [*casts_around("Softmax"), node("Add", "normed normed", "twice")]
    outputs = {"y": (HALF, [2, 8]), "twice": (FLOAT, [2, 8])}
    counts, _ = check(tmp_path, nodes, {"x": (HALF, [2, 8])}, outputs, {})
    assert counts["dropped_casts"] == 0


def test_what_hangs_on_constants_alone_is_computed_once(tmp_path):
    nodes = [
        node("Transpose", "m", "mt", perm=[1, 0]),
        node("Shape", "mt", "sizes"),
        node("Mul", "mt mt", "squared"),
        node("MatMul", "x squared", "y"),
        node("Identity", "sizes", "z"),
    ]
    outputs = {"y": (FLOAT, [1, ROWS, 6]), "z": (TensorProto.INT64, [2])}
    counts, left = check(tmp_path, nodes, X, outputs, {"m": weights(6, WIDTH)})
    assert counts["folded_constants"] == 3
    assert left == ["MatMul", "Identity"]  # a result is computed, not held


def test_a_constant_that_cannot_be_computed_is_reported_by_the_run(tmp_path):
    nodes = [node("Concat", "m other", "both", axis=0), node("MatMul", "x both", "y")]
    held = {"m": weights(4, 6), "other": weights(4, 5)}  # of different widths
    program = Program.read(write_graph(tmp_path / "g.onnx", nodes, X, Y, held))
    assert program.rewrite()["folded_constants"] == 0
    program.place(torch.device("cpu"), None)
    with pytest.raises(BackendError, match="Concat .* failed"):
        program.run({"x": torch.zeros(1, ROWS, WIDTH)})
