"""A tiny encoder whose text space is colour: it labels pixels with colour words, untrained.

A patch is its mean colour x with a one appended, a word ``[2c, 1 - |c|^2]`` for its colour c. Their
product is ``1 + |x|^2 - |x - c|^2``: the nearest colour wins.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

# sRGB values in 0..255 of common colour words, most from the CSS Color Module's named colours.
COLOUR_WORDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 10),
    "dark grey": (64, 64, 64),
    "grey": (128, 128, 128),
    "light grey": (200, 200, 200),
    "white": (255, 255, 255),
    "red": (220, 20, 20),
    "dark red": (120, 10, 10),
    "pink": (255, 160, 180),
    "orange": (255, 140, 0),
    "brown": (120, 75, 35),
    "beige": (225, 205, 170),
    "yellow": (250, 225, 30),
    "olive": (110, 115, 40),
    "green": (40, 150, 40),
    "dark green": (15, 65, 20),
    "turquoise": (64, 200, 195),
    "light blue": (165, 205, 240),
    "blue": (40, 90, 220),
    "dark blue": (15, 25, 100),
    "purple": (120, 40, 140),
}


def colour_embeds() -> tuple[tuple[str, ...], npt.NDArray[np.float32]]:
    """Return the words and their embeddings, float32 [C, 4]."""
    colours = np.array(list(COLOUR_WORDS.values()), np.float32) / 255.0
    squares = (colours**2).sum(axis=1, keepdims=True)
    return tuple(COLOUR_WORDS), np.concatenate([2.0 * colours, 1.0 - squares], axis=1)


def write_encoder(path: Path) -> None:
    """Write the encoder: ``image`` [1, 3, 256, 256] in 0..1 to ``embeds`` [1, 4, 64, 64]."""

    from support.graphs import FLOAT, node, write_graph

    pooled = {"kernel_shape": [4, 4], "strides": [4, 4]}
    write_graph(
        path,
        [
            node("AveragePool", "image", "colour", **pooled),
            node("Concat", "colour one", "embeds", axis=1),
        ],
        {"image": (FLOAT, (1, 3, 256, 256))},
        {"embeds": (FLOAT, (1, 4, 64, 64))},
        {"one": np.ones((1, 1, 64, 64), np.float32)},
    )


def export_colour_bundle(path: Path) -> Path:
    """Write the encoder as a dense bundle whose text bank is :data:`COLOUR_WORDS`."""
    from zsseg_rt.export import export_dense_bundle

    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder) / "colour_words.onnx")
        return export_dense_bundle(
            Path(folder) / "colour_words.onnx",
            path,
            image_size=256,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            embed_output="embeds",
            text_bank=colour_embeds(),
            normalize=False,
            activation="softmax",
            logit_scale=50.0,  # colours 0.2 apart get scores near 0.9
            space="colour",
            licence="Apache-2.0",
        )


def write_flags(root: Path, *names: str, count: int = 1) -> Path:
    """Write a data set of colours' stripes, 60x30, whose first row has no label."""
    import cv2

    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("\n".join(names))
    colours = np.array([COLOUR_WORDS[name.split(",")[0]] for name in names], np.uint8)
    for index in range(count):
        order = np.roll(np.arange(len(names), dtype=np.uint8), index)
        labels = order.repeat(60 // len(names))[None].repeat(30, axis=0)
        cv2.imwrite(str(root / "images" / f"{index}.png"), colours[labels][..., ::-1])
        labels[0] = 255
        cv2.imwrite(str(root / "masks" / f"{index}.png"), labels)
    return root
