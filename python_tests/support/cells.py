"""A dense bundle whose cells are the means of their pixels, and pictures for it."""

import numpy as np

from support.graphs import FLOAT, node, write_graph
from zsseg_rt.export import export_dense_bundle

NAMES = ["red", "green", "blue", "grey"]
ROWS = np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.5, 0.55]])
STATISTICS = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}
STEP, CELLS = 4, 6  # windows of 24 pixels


def bundle_at(folder, *, corners=False):
    """Means of a cell's pixels less the picture's; or its first pixel, with cells on corners."""
    side = STEP * (CELLS - 1) + 1 if corners else STEP * CELLS
    kernel = 1 if corners else STEP
    nodes = [
        node("AveragePool", "image", "pool", kernel_shape=[kernel] * 2, strides=[STEP] * 2),
        node("GlobalAveragePool", "image", "all"),
        node("Sub", "pool all", "embeds"),  # as attention, beyond the cell
    ]
    settings = {"activation": "softmax", "logit_scale": 4.0, "text_bank": (NAMES, ROWS)}
    return dense_bundle(folder, nodes, (side, side), (3, CELLS, CELLS), normalize=False, **settings)


def dense_bundle(folder, nodes, image_size, embeds, **settings):
    """A bundle of a graph from ``image`` to ``embeds``."""
    encoder = write_graph(
        folder / "encoder.onnx",
        nodes,
        {"image": (FLOAT, [1, 3, *image_size])},
        {"embeds": (FLOAT, [1, *embeds])},
    )
    return export_dense_bundle(
        encoder, folder / "cells.zsseg", image_size=image_size, **STATISTICS, **settings
    )


def image(height, width):
    coarse = np.random.default_rng(width).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3))
    return coarse.repeat(7, 0).repeat(7, 1)[:height, :width].astype(np.uint8)
