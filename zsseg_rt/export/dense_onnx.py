"""Wrap a foreign ONNX image encoder, whose patches live in a text space, as a dense bundle."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

import zsseg_rt
from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import ArgumentError, BackendError, BundleError
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.golden import NUMBERED_NAMES, dense_golden, preprocess_frame, unit_rows
from zsseg_rt.export.graph_files import MAX_CLASSES, WrittenGraph
from zsseg_rt.export.options import ENCODER_OPTIONS, TextBank, read_options
from zsseg_rt.export.text_side import TextSide
from zsseg_rt.onnx.arrays import compute
from zsseg_rt.onnx.check import check_model
from zsseg_rt.onnx.flow import Flow, with_floats
from zsseg_rt.onnx.network import Network, Node, renamed, weight_of
from zsseg_rt.onnx.reader import read_network
from zsseg_rt.onnx.table import newest

# onnx raises Python's own errors and, from its C++ parts, two that have no common base.
_ONNX_RAISES = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
)

_MOST_EXTRA = 8  # class and register tokens of known encoders
_MOST_FOLDED = 1 << 16  # numbers of a value that is computed when a bundle is written
_GOLDEN_ROWS = 64  # of a bank; more make the sample large and show no more


def export_dense_bundle(
    onnx_path: str | Path,
    path: str | Path,
    *,
    image_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    **options: Any,
) -> Path:
    """Write an encoder as a dense bundle: a pixel takes the class nearest to its patch.

    Only what the embeddings need of the graph is kept. The golden sample comes from the encoder as
    given, run by the ONNX reference evaluator; a bundle that disagrees with it is not written.

    Args:
        onnx_path: Graph from one image float32 [1, 3, H, W] to embeddings [1, D, gh, gw] or
            [1, N, D], patches row by row; their grid is that of N square patches, unless stated.
        path: Folder to write, ``NAME.zsseg``.
        image_size: Input size in pixels, one side or (height, width).
        mean: Mean of R, G, B, in 0..1.
        std: Standard deviation of R, G, B, in 0..1.
        **options: Those of :class:`zsseg_rt.export.options.ExportOptions` that every exporter
            reads, and those for foreign encoders; ``precisions`` are ``("float32",)`` by default.

    Returns:
        The bundle folder.

    Raises:
        ArgumentError: An option does not exist, or does not apply to foreign encoders.
        BundleError: The graph is not such an encoder, or the bundle cannot be written.
        VocabularyError: The text bank or the templates are unusable.
    """
    chosen = read_options(
        {"precisions": ("float32",), **options}, ENCODER_OPTIONS, "a foreign encoder"
    )
    size_hw = _sides("image_size", image_size)
    grid_hw = None if chosen.grid_hw is None else _sides("grid_hw", chosen.grid_hw)
    mean_rgb, std_rgb = _triple("mean", mean), _triple("std", std)
    with _as_bundle_errors():
        preprocess = PreprocessSpec(size_hw=size_hw, mean=mean_rgb, std=std_rgb)
    encoder = _read_encoder(Path(onnx_path), size_hw, chosen.embed_output, grid_hw)
    with _as_bundle_errors():
        head = HeadSpec(
            logit_scale=chosen.logit_scale,
            normalize=chosen.normalize,
            activation=chosen.activation,
            grid_hw=encoder.grid_hw,
            unknown_below=chosen.unknown_below,
            max_classes=MAX_CLASSES,
            align=chosen.align or guess_align(size_hw, encoder.grid_hw),
        )
    exported = ExportedModel(
        family="dense",
        architecture=chosen.architecture,
        graphs={"image_encoder": WrittenGraph(encoder.network)},
        preprocess=preprocess,
        head=head,
        text=TextSide(chosen, embed_dim=encoder.embed_dim),
        golden=partial(_golden, encoder, preprocess, head, chosen.text_bank),
        provenance={"package": f"zsseg_rt {zsseg_rt.__version__}", "opset": encoder.opset},
    )
    return write_model_bundle(Path(path), lambda: exported, chosen)


def guess_align(size_hw: tuple[int, int], grid_hw: tuple[int, int]) -> str:
    """Where cells lie, by the sizes: on the corners if 513 = 16 * 32 + 1 pixels have 33 cells."""
    for side, cells in zip(size_hw, grid_hw, strict=True):
        if cells < 2 or side % cells == 0 or (side - 1) % (cells - 1) != 0:
            return "half_pixel"
    return "corners"


@contextmanager
def _as_bundle_errors() -> Iterator[None]:
    """The manifest's own checks raise ValueError; only its reader turns that into BundleError."""
    try:
        yield
    except ValueError as exc:
        raise BundleError(str(exc)) from exc


@contextmanager
def _onnx_errors(path: Path, does: str) -> Iterator[None]:
    """Turn what onnx and its reference evaluator raise for unusable graphs into BundleError."""
    try:
        yield
    except _ONNX_RAISES as exc:
        raise BundleError(f"{path}: expected a graph that {does}, got {exc}") from exc


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """A foreign graph, cut down to one input and one output."""

    path: Path
    graph: onnx.ModelProto
    channels_first: bool
    grid_hw: tuple[int, int]
    embed_dim: int

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        versions = [o.version for o in self.graph.opset_import if o.domain in ("", "ai.onnx")]
        return int(max(versions))

    def run_as_given(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Patch embeddings float32 [1, N, D] of the unchanged graph."""
        from onnx.reference import ReferenceEvaluator

        feeds = {self.graph.graph.input[0].name: image}
        with _onnx_errors(self.path, "the reference evaluator runs"):
            embeds: Any = ReferenceEvaluator(self.graph).run(None, feeds)[0]
        if self.channels_first:
            embeds = embeds.reshape(1, self.embed_dim, -1).transpose(0, 2, 1)
        return np.ascontiguousarray(embeds, np.float32)

    def network(self) -> Network:
        """The graph from ``image`` to ``patch_embeds`` [1, N, D]."""
        given, tokens = self.graph.graph.output[0].name, "patch_embeds"
        names = {"image": "image.given", tokens: f"{tokens}.given"}
        names[self.graph.graph.input[0].name] = "image"
        if not self.channels_first:
            names[given] = tokens
        network = read_network(self.graph.SerializeToString())
        nodes = [renamed(node, names) for node in network.nodes]
        weights = {names.get(name, name): weight for name, weight in network.weights.items()}
        if self.channels_first:
            weights["zsseg.flat_shape"] = weight_of(np.array([1, self.embed_dim, -1], np.int64))
            inputs, flat = (names.get(given, given), "zsseg.flat_shape"), ("zsseg.flat",)
            nodes.append(Node("flatten", "Reshape", inputs, flat, {}))
            nodes.append(Node("to_tokens", "Transpose", flat, (tokens,), {"perm": [0, 2, 1]}))
        shape = (1, self.grid_hw[0] * self.grid_hw[1], self.embed_dim)
        embeds = TensorSpec(name=tokens, dtype="float32", shape=shape)
        return with_floats(
            Network(
                inputs=(replace(network.inputs[0], name="image"),),
                outputs=(embeds,),
                nodes=tuple(nodes),
                weights=weights,
                opset=network.opset,
            )
        )


def _read_encoder(
    path: Path,
    size_hw: tuple[int, int],
    embed_output: str | None,
    grid_hw: tuple[int, int] | None,
) -> _Encoder:
    model = _load(path)
    inputs = model.graph.input
    outputs = {value.name: value for value in model.graph.output}
    wanted = embed_output or next(iter(outputs), "")
    if len(inputs) != 1 or wanted not in outputs:
        raise BundleError(
            f"{path}: expected one image input and an output {wanted!r}, got inputs "
            f"{', '.join(v.name for v in inputs)} and outputs {', '.join(outputs)}. "
            "Name the embeddings with embed_output."
        )
    _fix_input(path, inputs[0], size_hw)
    _cut(model, outputs[wanted])
    _fold_sizes(model)
    _check(path, model)
    with _onnx_errors(path, f"takes {size_hw[0]}x{size_hw[1]} pixels"):
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    return _describe_output(path, model, wanted, _shape(model.graph.output[0]), size_hw, grid_hw)


def _cut(model: onnx.ModelProto, output: onnx.ValueInfoProto) -> None:
    """Keep what one output needs; what was noted about sizes may be of another input size."""
    needed = {output.name}
    nodes, weights = model.graph.node, model.graph.initializer
    for index in reversed(range(len(nodes))):
        if needed.intersection(nodes[index].output):
            needed.update(nodes[index].input)
        else:
            del nodes[index]
    for index in reversed(range(len(weights))):
        if weights[index].name not in needed:
            del weights[index]
    output.type.tensor_type.ClearField("shape")
    for index in reversed(range(len(model.graph.output))):
        if model.graph.output[index].name != output.name:
            del model.graph.output[index]
    del model.graph.value_info[:]


def _fold_sizes(model: onnx.ModelProto) -> None:
    """Replace what follows from fixed sizes and small constants alone by its value.

    Exporters write ``x.shape[2] // 14`` as nodes; the check at load knows sizes that are moved, and
    computes nothing. What cannot be followed is left to the check, which names it.
    """
    computed: dict[str, npt.NDArray[Any]] = {}
    folded: set[int] = set()
    with suppress(ValueError):
        network = read_network(model.SerializeToString())
        flow = Flow(network)
        for name, weight in network.weights.items():
            if weight.array.size <= _MOST_FOLDED and weight.array.dtype.name == weight.dtype:
                computed[name] = weight.array
        for index, node in enumerate(network.nodes):
            flow.follow(index)
            results = _compute(node, network.opset, flow, computed)
            for name, array in zip(node.outputs, results, strict=False):
                computed[name] = array
                flow.values[name] = flow.constant(weight_of(array))
                model.graph.initializer.append(numpy_helper.from_array(array, name))
                folded.add(index)
    kept = [node for index, node in enumerate(model.graph.node) if index not in folded]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _compute(
    node: Node, opset: int, flow: Flow, computed: Mapping[str, npt.NDArray[Any]]
) -> tuple[npt.NDArray[Any], ...]:
    """A node's results; none if they need an image."""
    values = [flow.values[name] for name in node.outputs]
    if node.kind in ("Shape", "Size"):
        sizes = values[0].known
        whole = sizes is not None and None not in sizes.reshape(-1)
        return (np.asarray(sizes, np.int64),) if whole else ()
    is_small = all(value.size <= _MOST_FOLDED for value in values)
    if not is_small or not computed.keys() >= set(node.inputs) - {""}:
        return ()
    inputs = [computed[name] if name else None for name in node.inputs]
    with suppress(ValueError, LookupError):  # what NumPy cannot compute stays a node
        made = compute(node.kind, inputs, newest(node, opset).attributes)
        return tuple(map(np.asarray, made if isinstance(made, tuple) else (made,)))
    return ()


def _describe_output(
    path: Path,
    graph: onnx.ModelProto,
    output: str,
    shape: tuple[int, ...],
    size_hw: tuple[int, int],
    grid_hw: tuple[int, int] | None,
) -> _Encoder:
    known = len(shape) in (3, 4) and shape[0] == 1 and min(shape) > 0
    found: tuple[int, int] | None = None
    if known and len(shape) == 4:
        found = (shape[2], shape[3])
    elif known:
        found = grid_hw or _guess_grid(path, output, shape[1], size_hw)
    patches = None if found is None or len(shape) == 4 else found[0] * found[1]
    if found is None or grid_hw not in (None, found) or patches not in (None, shape[1]):
        raise BundleError(
            f"{path}: {output}: expected embeddings [1, D, gh, gw], or [1, gh * gw, D] with "
            f"grid_hw=(gh, gw), got shape {shape} and grid_hw={grid_hw}."
        )
    channels_first = len(shape) == 4
    return _Encoder(
        path=path,
        graph=graph,
        channels_first=channels_first,
        grid_hw=found,
        embed_dim=shape[1] if channels_first else shape[2],
    )


def _guess_grid(path: Path, output: str, tokens: int, size_hw: tuple[int, int]) -> tuple[int, int]:
    """The grid of square patches that has as many cells as there are tokens."""
    height, width = size_hw
    grids = {(height // side, width // side) for side in range(1, min(size_hw) + 1)}
    fitting = [grid for grid in grids if grid[0] * grid[1] == tokens]
    if len(fitting) == 1:
        return fitting[0]
    more = min((tokens - h * w for h, w in grids if h * w < tokens), default=tokens)
    why = "which square patches do not make"
    if more <= _MOST_EXTRA:
        why = f"{more} more than square patches make, as with class or register tokens"
    raise BundleError(
        f"{path}: {output}: expected one token for each patch of {height}x{width} pixels, got "
        f"{tokens}, {why}. Name an output without others, or state the grid (grid_hw=(gh, gw), or "
        "--grid-hw GH GW on the command line)."
    )


def _load(path: Path) -> onnx.ModelProto:
    """The graph with its weights, without what onnx.compose and older exporters list twice."""
    try:
        model = onnx.load(path)
    except (OSError, DecodeError, *_ONNX_RAISES) as exc:
        raise BundleError(f"{path}: expected an ONNX graph, got {exc}") from exc
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in weights]:
        model.graph.input.remove(value)  # a weight's default
    opsets = {(opset.domain, opset.version): opset for opset in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(opsets.values())
    return model


def _check(path: Path, model: onnx.ModelProto) -> None:
    """Check a graph as the runtime will check what is made from it."""
    try:
        check_model(memoryview(model.SerializeToString()), str(path))
    except (BackendError, ValueError, DecodeError) as exc:
        raise BundleError(str(exc)) from exc


def _fix_input(path: Path, value: onnx.ValueInfoProto, size_hw: tuple[int, int]) -> None:
    """Give the input its one shape; a fixed axis of another size is refused."""
    tensor = value.type.tensor_type
    wanted = (1, 3, *size_hw)
    given = _shape(value)
    fits = len(given) == 4 and all(g in (0, w) for g, w in zip(given, wanted, strict=True))
    if not fits or tensor.elem_type != TensorProto.FLOAT:
        raise BundleError(
            f"{path}: {value.name}: expected float32 {wanted}, got type {tensor.elem_type} and "
            f"shape {given}. Give image_size as the graph's input."
        )
    for dim, size in zip(tensor.shape.dim, wanted, strict=True):
        dim.dim_value = size


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Sizes of a tensor; 0 stands for a dynamic axis."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _golden(
    encoder: _Encoder, preprocess: PreprocessSpec, head: HeadSpec, bank: TextBank | None
) -> dict[str, npt.NDArray[Any]]:
    if bank is None:
        names: Sequence[str] = NUMBERED_NAMES
        embeds = unit_rows(len(names), encoder.embed_dim)
    else:
        names = list(bank[0])[:_GOLDEN_ROWS]
        embeds = np.ascontiguousarray(bank[1][:_GOLDEN_ROWS], np.float32)
    image = preprocess_frame(preprocess, head.align)
    return dense_golden(image, encoder.run_as_given(image), head, (names, embeds))


def _sides(name: str, given: int | tuple[int, int]) -> tuple[int, int]:
    sides = (given, given) if isinstance(given, int) else given
    try:
        height, width = (operator.index(side) for side in sides)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}: expected (height, width), got {given!r}") from None
    return height, width


def _triple(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise BundleError(f"{name}: expected three values for R, G, B, got {values!r}") from None
    return red, green, blue
