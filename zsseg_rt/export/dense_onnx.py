"""Wrap a foreign ONNX image encoder, whose patches live in a text space, as a dense bundle."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import zsseg_rt
from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import ArgumentError, BundleError
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.golden import labels_golden, preprocess_frame, random_rows
from zsseg_rt.export.options import ENCODER_OPTIONS, TextBank, read_options
from zsseg_rt.export.text_side import TextSide
from zsseg_rt.onnx.arrays import compute, run_network
from zsseg_rt.onnx.check import Flow
from zsseg_rt.onnx.network import Network, Node, renamed, weight_of
from zsseg_rt.onnx.reader import map_file, read_network
from zsseg_rt.onnx.rules import constant, fixed
from zsseg_rt.onnx.table import newest

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

    Only what the embeddings need of the graph is kept. The golden sample is what NumPy computes of
    the encoder as given; a bundle that disagrees with it is not written.

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
    export_options = read_options(
        {"precisions": ("float32",), **options}, ENCODER_OPTIONS, "a foreign encoder"
    )
    encoder_path, rgb = Path(onnx_path), "three values for R, G, B"
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    grid_hw = export_options.grid_hw
    with _bundle_errors():
        size_hw = _numbers("image_size", sides, 2, "(height, width)", operator.index)
        if grid_hw is not None:
            grid_hw = _numbers("grid_hw", grid_hw, 2, "(height, width)", operator.index)
        preprocess = PreprocessSpec(
            size_hw=size_hw,
            mean=_numbers("mean", mean, 3, rgb, float),
            std=_numbers("std", std, 3, rgb, float),
        )
        encoder = _read_encoder(encoder_path, size_hw, export_options.embed_output, grid_hw)
        head = HeadSpec(
            logit_scale=export_options.logit_scale,
            normalize=export_options.normalize,
            activation=export_options.activation,
            grid_hw=encoder.grid_hw,
            unknown_below=export_options.unknown_below,
            align=export_options.align or guess_align(size_hw, encoder.grid_hw),
        )
    exported = ExportedModel(
        family="dense",
        architecture=export_options.architecture,
        graphs={"image_encoder": partial(encoder.tokens, encoder.folded)},
        preprocess=preprocess,
        head=head,
        text=TextSide(export_options, embed_dim=encoder.embed_dim),
        golden=partial(_golden, encoder, export_options.text_bank),
        provenance={"package": f"zsseg_rt {zsseg_rt.__version__}", "opset": encoder.original.opset},
    )
    return write_model_bundle(Path(path), lambda: exported, export_options)


def guess_align(size_hw: tuple[int, int], grid_hw: tuple[int, int]) -> str:
    """Where cells lie, by the sizes: on the corners if 513 = 16 * 32 + 1 pixels have 33 cells."""
    for side, cells in zip(size_hw, grid_hw, strict=True):
        if cells < 2 or side % cells == 0 or (side - 1) % (cells - 1) != 0:
            return "half_pixel"
    return "corners"


@contextmanager
def _bundle_errors(where: str = "") -> Iterator[None]:
    """Turn ValueErrors of a manifest's checks, or about a graph, into BundleErrors."""
    try:
        yield
    except ValueError as exc:
        raise BundleError(f"{where}{exc}") from exc


class _Encoder(NamedTuple):
    """A foreign graph, cut down to one input and one output."""

    path: Path
    original: Network  # As it was read
    folded: Network  # With constants for what follows from sizes
    channels_first: bool
    grid_hw: tuple[int, int]
    embed_dim: int

    def golden(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Patch embeddings float32 [1, N, D] of the graph as it was read, by NumPy."""
        network = self.tokens(self.original)
        with _bundle_errors(f"{self.path}: "):
            return np.asarray(run_network(network, {"image": image})["patch_embeds"], np.float32)

    def tokens(self, network: Network) -> Network:
        """The network from ``image`` to ``patch_embeds`` [1, N, D]."""
        tokens, output = "patch_embeds", network.outputs[0].name
        names = {"image": "image.given", tokens: f"{tokens}.given"}
        names[network.inputs[0].name] = "image"
        if not self.channels_first:
            names[output] = tokens
        nodes = [renamed(node, names) for node in network.nodes]
        weights = {names.get(name, name): weight for name, weight in network.weights.items()}
        if self.channels_first:
            weights["zsseg.flat_shape"] = weight_of(np.array([1, self.embed_dim, -1], np.int64))
            inputs, flat = (names.get(output, output), "zsseg.flat_shape"), ("zsseg.flat",)
            nodes.append(Node("flatten", "Reshape", inputs, flat, {}))
            nodes.append(Node("to_tokens", "Transpose", flat, (tokens,), {"perm": [0, 2, 1]}))
        shape = (1, self.grid_hw[0] * self.grid_hw[1], self.embed_dim)
        return Network(
            inputs=(replace(network.inputs[0], name="image"),),
            outputs=(TensorSpec(name=tokens, dtype="float32", shape=shape),),
            nodes=tuple(nodes),
            weights=weights,
            opset=network.opset,
        )


def _read_encoder(
    path: Path,
    size_hw: tuple[int, int],
    embed_output: str | None,
    grid_hw: tuple[int, int] | None,
) -> _Encoder:
    try:
        network = read_network(map_file(path), beside=path.parent)
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path}: expected an ONNX graph, got {exc}") from exc
    # Older exporters list the weights among the inputs, too.
    inputs = [spec for spec in network.inputs if spec.name not in network.weights]
    outputs = {spec.name: spec for spec in network.outputs}
    wanted = embed_output or next(iter(outputs))
    if len(inputs) != 1 or wanted not in outputs:
        raise BundleError(
            f"{path}: expected one image input and an output {wanted!r}, got inputs "
            f"{', '.join(spec.name for spec in inputs)} and outputs {', '.join(outputs)}. "
            "Name the embeddings with embed_output."
        )
    image = _fixed(path, inputs[0], size_hw)
    original = _cut(network, image, outputs[wanted])
    with _bundle_errors(f"{path}: "):
        folded = _fold_sizes(original)
        shape = Flow(folded).run().values[wanted].shape
    sizes = tuple(size if fixed(size) else 0 for size in shape)
    grid, first = _grid(path, wanted, sizes, size_hw, grid_hw), len(sizes) == 4
    return _Encoder(path, original, folded, first, grid, embed_dim=sizes[1 if first else 2])


def _fixed(path: Path, image: TensorSpec, size_hw: tuple[int, int]) -> TensorSpec:
    """The input with its one shape; a fixed axis of another size is refused."""
    wanted = (1, 3, *size_hw)
    sizes = tuple(size if isinstance(size, int) else 0 for size in image.shape)
    fits = len(sizes) == 4 and all(a in (0, b) for a, b in zip(sizes, wanted, strict=True))
    if not fits or image.dtype != "float32":
        raise BundleError(
            f"{path}: {image.name}: expected float32 {wanted}, got {image.dtype} {sizes}. Give "
            "image_size as the graph's input."
        )
    return replace(image, shape=wanted)


def _cut(network: Network, image: TensorSpec, output: TensorSpec) -> Network:
    """Keep what one output needs; what was noted about sizes may be of another input size."""
    needed, nodes = {output.name}, []
    for node in reversed(network.nodes):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            nodes.append(node)
    weights = {name: weight for name, weight in network.weights.items() if name in needed}
    return replace(
        network,
        inputs=(image,),
        outputs=(replace(output, shape=()),),
        nodes=tuple(reversed(nodes)),
        weights=weights,
    )


def _fold_sizes(network: Network) -> Network:
    """Replace nodes that follow from fixed sizes, such as ``x.shape[2] // 14``, by constants."""
    flow, nodes, weights = Flow(network), list[Node](), dict(network.weights)
    computed = {
        name: weight.array
        for name, weight in weights.items()
        if weight.array.size <= _MOST_FOLDED and weight.array.dtype.name == weight.dtype
    }
    for node in network.nodes:
        flow.follow(node)
        results = _compute(node, network.opset, flow, computed)
        for name, array in zip(node.outputs, results, strict=False):
            computed[name] = array
            weights[name] = weight_of(array)
            flow.values[name] = constant(array.dtype.name, array)
        if not results:
            nodes.append(node)
    return replace(network, nodes=tuple(nodes), weights=weights)


def _compute(
    node: Node, opset: int, flow: Flow, computed: Mapping[str, npt.NDArray[Any]]
) -> tuple[npt.NDArray[Any], ...]:
    """A node's results; none if they need an image."""
    values = [flow.values[name] for name in node.outputs if name]
    if node.kind in ("Shape", "Size"):
        sizes = values[0].known
        whole = sizes is not None and fixed(*sizes.reshape(-1))
        return (np.asarray(sizes, np.int64),) if whole else ()
    is_small = all(value.size <= _MOST_FOLDED for value in values)
    if not is_small or not computed.keys() >= set(node.inputs) - {""}:
        return ()
    inputs = [computed[name] if name else None for name in node.inputs]
    with suppress(ValueError, LookupError):  # what NumPy cannot compute stays a node
        results = compute(node.kind, inputs, newest(node, opset).attributes)
        return tuple(map(np.asarray, results if isinstance(results, tuple) else (results,)))
    return ()


def _grid(
    path: Path,
    output: str,
    shape: tuple[int, ...],
    size_hw: tuple[int, int],
    grid_hw: tuple[int, int] | None,
) -> tuple[int, int]:
    """The patch grid of an output [1, D, gh, gw] or [1, N, D]."""
    is_one = len(shape) in (3, 4) and shape[0] == 1 and min(shape) > 0
    if is_one and len(shape) == 4:
        grids = {(shape[2], shape[3])}
    else:
        height, width = size_hw
        squares = ((height // side, width // side) for side in range(1, min(size_hw) + 1))
        tokens = shape[1] if is_one else 0
        stated = squares if grid_hw is None else (grid_hw,)
        grids = {grid for grid in stated if grid[0] * grid[1] == tokens}
    if len(grids) != 1 or grid_hw not in (None, *grids):
        raise BundleError(
            f"{path}: {output}: expected embeddings [1, D, gh, gw], or [1, gh * gw, D] of square "
            f"patches or grid_hw=(gh, gw), got shape {shape} and grid_hw={grid_hw} for "
            f"{size_hw[0]}x{size_hw[1]} pixels. Name an output without class or register tokens, "
            "or state the grid (--grid-hw GH GW on the command line)."
        )
    return grids.pop()


def _golden(
    encoder: _Encoder, bank: TextBank | None, model: ExportedModel, names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    if bank is None:
        embeds = random_rows(len(names), encoder.embed_dim)
    else:
        names = list(bank[0])[:_GOLDEN_ROWS]
        embeds = np.ascontiguousarray(bank[1][:_GOLDEN_ROWS], np.float32)
    image = preprocess_frame(model.preprocess, model.head.align)
    patches = encoder.golden(image)
    stages = {"text_embeds": embeds, "image": image, "patch_embeds": patches}
    return stages | labels_golden(patches, embeds, model.head, names)


def _numbers(name: str, values: Any, count: int, what: str, kind: Callable[[Any], Any]) -> Any:
    try:
        numbers = tuple(map(kind, values))
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != count:
        raise ArgumentError(f"{name}: expected {what}, got {values!r}. Change it.")
    return numbers
