"""Export CAT-Seg, from its authors' file or from a model in torch: family ``aggregation``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import AggregationSpec, HeadSpec, PreprocessSpec
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.golden import golden_frame, preprocess_frame
from zsseg_rt.export.graph_files import (
    WrittenGraph,
    weights_of,
    written_graph,
)
from zsseg_rt.export.options import COMMON_OPTIONS, ExportOptions, read_options
from zsseg_rt.export.text_side import TextSide, clip_text
from zsseg_rt.networks.cat_seg import (
    GRAPHS,
    TEMPLATES,
    TEXT_SPACE,
    CatSegNetwork,
    class_halves,
    encode_view,
    head,
)
from zsseg_rt.networks.clip import part_of
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.ops import reference
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD, read_floats
from zsseg_rt.torch_files.official import check_cat_seg, check_masks
from zsseg_rt.torch_files.shapes import divisor

PADDING = 256  # classes that shorter vocabularies are padded to, officially
MOST_CLASSES = 256  # that the official head looks at

Tensors = Mapping[str, npt.NDArray[Any]]


def export_cat_seg_file(
    file: str | Path,
    path: str | Path,
    *,
    check: Callable[[Tensors], None] = lambda _: None,
    **options: Any,
) -> Path:
    """Write a bundle of an official checkpoint of CAT-Seg B, without torch."""
    file = Path(file)
    export_options = read_options({"source": file.name} | options, COMMON_OPTIONS, "cat_seg")

    def make() -> ExportedModel:
        official = read_floats(file)
        network, text = _read_network(official, file.name)
        check(official)
        return _cut(network, text, export_options, (PADDING, MOST_CLASSES), TEXT_SPACE)

    return write_model_bundle(Path(path), make, export_options)


def _read_network(official: Tensors, name: str) -> tuple[CatSegNetwork, WrittenText | None]:
    tensors, sizes = check_cat_seg(official, name)
    network = CatSegNetwork(
        tensors=tensors,
        image_heads=divisor("num_heads", None, len(tensors["image_encoder.ln_pre.weight"])),
        num_heads=divisor("num_heads", CatSegNetwork.num_heads, sizes["H"]),
    )
    check_masks(official, network.grid, network.window)
    last, side = len(network.tower.blocks) - 1, network.tower.patch_size
    if network.taps[1] >= last or network.view % side or network.grid % network.window:
        raise CheckpointError(
            f"{name}: expected a CLIP of more than {network.taps[1] + 1} blocks whose patches make "
            f"windows of {network.window} in {network.view} pixels, got {last + 1} blocks and "
            f"patches of {side}. Use the B weights."
        )
    return network, clip_text(part_of(tensors, "text_encoder."), network.activation)


def export_cat_seg(model: Any, options: ExportOptions) -> ExportedModel:
    """Cut a CAT-Seg in torch into a bundle's parts."""
    if options.size_hw not in (None, model.size_hw):
        raise ArgumentError(
            f"size_hw: expected None or {model.size_hw} for cat_seg, whose windows fit one size, "
            f"got {options.size_hw}. Leave it out."
        )
    most = model.config.aggregator.padding, model.config.most_classes
    return _cut(network_of(model), model.text_encoder, options, most, model.text_space)


def _cut(
    network: CatSegNetwork,
    tower: Any,
    options: ExportOptions,
    classes: tuple[int, int | None],  # that shorter lists are padded to, and that are looked at
    space: str,
) -> ExportedModel:
    """A bundle's parts; the engine looks at the whole frame once."""
    _refuse_other_towers(tower, options, space)
    padding, most = classes
    text = TextSide(
        options,
        embed_dim=network.tower.tensors["proj"].shape[1],
        templates=TEMPLATES,
        space=space,
        tower=tower,
    )
    preprocess = PreprocessSpec(size_hw=(network.view,) * 2, mean=CLIP_MEAN, std=CLIP_STD)
    return ExportedModel(
        family="aggregation",
        architecture="cat_seg",
        graphs=graphs_of(network),
        weights=network.vocabulary_weights(),
        preprocess=preprocess,
        head=HeadSpec(
            logit_scale=1.0,
            normalize=True,
            activation="sigmoid",
            grid_hw=(network.grid, network.grid),
        ),
        sections={"aggregation": AggregationSpec(padding=padding, most=most)},
        text=text,
        golden=partial(_golden, network),
    )


def graphs_of(network: CatSegNetwork) -> dict[str, WrittenGraph]:
    """The encoder, and the head whole and in parts; the number of classes stays open."""

    def graph(name: str) -> WrittenGraph:
        function, inputs = GRAPHS[name]
        shapes = network.shapes()
        return written_graph(
            lambda ops, **values: function(ops, network, values),
            {one: shapes[one] for one in inputs.split()},
        )

    return {name: graph(name) for name in GRAPHS}


def network_of(model: Any) -> CatSegNetwork:
    """The weights of a model in torch, and its settings."""
    config = model.config
    return CatSegNetwork(
        tensors=weights_of(model),
        image_heads=config.image_encoder.num_heads,
        num_heads=config.aggregator.num_heads,
        window=config.aggregator.window,
        taps=config.taps,
        view=config.view,
        activation=config.image_encoder.activation,
    )


def _refuse_other_towers(tower: Any, options: ExportOptions, space: str) -> None:
    """CLIP's own text tower has the same width, but the fine-tuned image tower left its space."""
    others = {
        "text_encoder": tower is not None and options.text_encoder not in ("auto", None),
        "space": options.space not in (None, space),
    }
    for name, other in others.items():
        if other:
            raise ArgumentError(
                f"{name}: expected none for cat_seg, whose text tower was trained with it, got "
                "another. Leave it out."
            )


def _golden(
    network: CatSegNetwork, model: ExportedModel, names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """The golden sample: one image and every tensor that NumPy computes of it."""
    rule = model.sections["aggregation"]
    names = names[: rule.most]
    frame, (embeds, extra) = golden_frame(), model.text.embed(names)
    image = preprocess_frame(model.preprocess)
    arrays = {
        **encode_view(Arrays(), network, image),
        "text_embeds": embeds,
        "class_halves": class_halves(network, embeds),
        "padding": np.array([max(0, rule.padding - len(names))], np.float32),
    }
    logits = head(Arrays(), network, arrays)["mask_logits"]
    labels, scores = reference.upsample_argmax(
        logits, (frame.shape[0], frame.shape[1]), activation="sigmoid", with_scores=True
    )
    assert scores is not None
    return {
        **arrays,
        **extra,
        "frame": frame,
        "image": image,
        "class_names": np.array(list(names)),
        "mask_logits": logits,
        "logits_in_parts": logits,
        "labels": labels[0],
        "scores": scores[0],
    }
