"""TIPSv2 in any size: official keys, weights by the vectors' rule, and a small tokenizer."""

from __future__ import annotations

import io
import math
import random
from functools import cache
from typing import Any

import numpy as np

from support.golden_encoders import drawn
from zsseg_rt.torch_files.shapes import expand
from zsseg_rt.torch_files.tips_weights import TEXT, VISION

SMALL = {"width": 64, "depth": 4, "heads": 4, "img": 112, "salt": "small"}
SMALL_TEXT = {"width": 64, "layers": 2, "heads": 4, "mlp": 128, "salt": "smalltext"}


def rule(key: str, shape: tuple[int, ...], salt: str) -> np.ndarray:
    """The vectors' rule for weights, float32."""
    n = drawn(salt + key, shape)
    if key.endswith(".gamma"):
        n = 0.6 + 0.1 * n
    elif key in ("pos_embed", "cls_token", "register_tokens", "mask_token"):
        n = 0.5 * n
    elif len(shape) == 1:
        n = 0.1 * n + (1 if key.endswith(".weight") else 0)
    else:
        n = n / math.sqrt(math.prod(shape[1:]))
    return (n * (2 if key.endswith(("qkv.weight", "in_proj_weight")) else 1)).astype(np.float32)


def vision(**changed: Any) -> dict[str, np.ndarray]:
    """Weights of an image tower."""
    c = SMALL | changed
    sizes = {"W": c["width"], "M": 4 * c["width"], "R": 1 + (c["img"] // 14) ** 2}
    shapes = expand(VISION, sizes, lambda _: c["depth"])
    return {key: rule(key, shape, c["salt"]) for key, shape in shapes.items()}


def text(**changed: Any) -> dict[str, np.ndarray]:
    """Weights of a text tower, for the small tokenizer unless ``vocab`` is given."""
    vocab = {} if "vocab" in changed else {"vocab": vocab_size(pieces())}
    c = SMALL_TEXT | vocab | changed
    sizes = {"T": c["width"], "F": c["mlp"], "V": c["vocab"]}
    shapes = expand(TEXT, sizes, lambda _: c["layers"])
    return {key: rule(key, shape, c["salt"]) for key, shape in shapes.items()}


@cache
def pieces(kind: str = "unigram", size: int = 160) -> bytes:
    """A SentencePiece model, trained on the spot; its unknown piece has number 0."""
    import sentencepiece

    draw, model = random.Random(0), io.BytesIO()
    words = "a photo of the large small bad many itap art origami video game in dog cat road sky"
    words += " person tree traffic light chest drawers étagère naïve straße"
    ends = ("", "s", "ing", ".", "er")
    lines = (
        " ".join(draw.choice(words.split()) + draw.choice(ends) for _ in range(8))
        for _ in range(2000)
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=size,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def vocab_size(model: bytes) -> int:
    """Pieces of a SentencePiece model."""
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())


def model_of(c: dict[str, Any], **settings: Any) -> Any:
    """A model in torch with the weights of a case."""
    from zsseg_rt import models

    towers = {"vision": vision(**c)}
    return models.from_official("tips", towers, num_heads=c["heads"], **settings)
