"""Export CAT-Seg: family ``aggregation``. Neither torch nor onnx is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import AggregationSpec, HeadSpec, PreprocessSpec
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.golden import (
    NUMBERED_NAMES,
    golden_frame,
    preprocess_frame,
)
from zsseg_rt.export.graph_files import (
    MAX_CLASSES,
    WrittenGraph,
    provenance,
    weights_of,
    written_graph,
)
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide
from zsseg_rt.networks.cat_seg import (
    GRAPHS,
    TEMPLATES,
    CatSegNetwork,
    class_halves,
    encode_view,
    head,
)
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.ops import reference


def export_cat_seg(model: Any, options: ExportOptions) -> ExportedModel:
    """Cut a CAT-Seg into a bundle's parts; the engine looks at the whole frame once.

    Graphs and tensors: ``image_encoder``: ``image`` [1, 3, v, v] to ``patch_embeds`` [1, N, D],
    ``spatial`` [8, N, h], ``near_map`` and ``far_map``; ``head``: these, ``text_embeds``
    [classes, D], ``class_halves`` [classes, 4 h] and ``padding`` [1] to ``mask_logits``
    [1, classes, 4 g, 4 g]; ``head_1`` to ``head_3``: the same for vocabularies in several parts,
    cut where classes meet. See :mod:`zsseg_rt.networks.cat_seg`.
    """
    if options.size_hw not in (None, model.size_hw):
        raise ArgumentError(
            f"size_hw: expected None or {model.size_hw} for cat_seg, whose windows fit one size, "
            f"got {options.size_hw}. Leave it out."
        )
    _refuse_other_towers(model, options)
    network, config = network_of(model), model.config
    text = TextSide(
        options,
        embed_dim=config.image_encoder.embed_dim,
        templates=TEMPLATES,
        template_set="CAT-Seg",
        space=model.text_space,
        tower=model.text_encoder,
    )
    padding, most = config.aggregator.padding, config.most_classes
    names = list(options.class_names or NUMBERED_NAMES)[: min(most or MAX_CLASSES, MAX_CLASSES)]
    preprocess = PreprocessSpec(size_hw=model.size_hw, mean=model.image_mean, std=model.image_std)
    return ExportedModel(
        family="aggregation",
        architecture=model.architecture,
        graphs=graphs_of(network),
        weights=network.vocabulary_weights(),
        preprocess=preprocess,
        head=HeadSpec(
            logit_scale=1.0,
            normalize=True,
            activation="sigmoid",
            grid_hw=(network.grid, network.grid),
            max_classes=MAX_CLASSES,
        ),
        sections={"aggregation": AggregationSpec(padding=padding, most=most)},
        text=text,
        golden=partial(_golden, network, padding, preprocess, text, names),
        provenance=provenance(),
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


def _refuse_other_towers(model: Any, options: ExportOptions) -> None:
    """CLIP's own text tower has the same width, but the fine-tuned image tower left its space."""
    for name, other in (
        (
            "text_encoder",
            model.text_encoder is not None and options.text_encoder not in ("auto", None),
        ),
        ("space", options.space not in (None, model.text_space)),
    ):
        if other:
            raise ArgumentError(
                f"{name}: expected none for cat_seg, whose text tower was trained with it, got "
                "another. Leave it out."
            )


def _golden(
    network: CatSegNetwork,
    most_padding: int,
    preprocess: PreprocessSpec,
    text: TextSide,
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """What NumPy computes of the network on one image."""
    frame, (embeds, extra) = golden_frame(), text.embed_golden(names)
    image = preprocess_frame(preprocess)
    arrays = {
        **encode_view(Arrays(), network, image),
        "text_embeds": embeds,
        "class_halves": class_halves(network, embeds),
        "padding": np.array([max(0, most_padding - len(names))], np.float32),
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
