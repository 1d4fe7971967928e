"""TIPSv2 in any size: official keys, weights by the vectors' rule, and a small tokenizer."""

from __future__ import annotations

import io
import math
import random
import zlib
from functools import cache
from typing import Any

import numpy as np

SMALL = {"width": 64, "depth": 4, "heads": 4, "img": 112, "salt": "small"}
SMALL_TEXT = {"width": 64, "layers": 2, "heads": 4, "mlp": 128, "salt": "smalltext"}


def vision_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Official keys of the image tower."""
    width = c["width"]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + (c["img"] // 14) ** 2, width),
        "register_tokens": (1, 1, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(c["depth"]):
        at = f"blocks.{block}."
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (outs, ins) in linears.items():
            shapes[f"{at}{name}.weight"] = (outs * width, ins * width)
            shapes[f"{at}{name}.bias"] = (outs * width,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[at + name] = (width,)
        shapes |= {f"{at}ls1.gamma": (width,), f"{at}ls2.gamma": (width,)}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


def text_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Official keys of the text tower, without the temperature."""
    width, mlp = c["width"], c["mlp"]
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (c["vocab"], width)}
    for block in range(c["layers"]):
        at = f"transformer.resblocks.{block}."
        linears = {
            "attn.in_proj_": (3 * width, width),
            "attn.out_proj.": (width, width),
            "mlp.c_fc.": (mlp, width),
            "mlp.c_proj.": (width, mlp),
        }
        for name, (outs, ins) in linears.items():
            shapes |= {f"{at}{name}weight": (outs, ins), f"{at}{name}bias": (outs,)}
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            shapes[at + name] = (width,)
    return shapes | {"ln_final.weight": (width,), "ln_final.bias": (width,)}


def rule(key: str, shape: tuple[int, ...], salt: str) -> np.ndarray:
    """The vectors' rule for weights, float32."""
    seed = zlib.crc32((salt + key).encode()) & 0xFFFFFFFF
    n = np.random.RandomState(seed).standard_normal(shape)
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
    return {key: rule(key, shape, c["salt"]) for key, shape in vision_shapes(c).items()}


def text(**changed: Any) -> dict[str, np.ndarray]:
    """Weights of a text tower, for the small tokenizer unless ``vocab`` is given."""
    vocab = {} if "vocab" in changed else {"vocab": vocab_size(pieces())}
    c = SMALL_TEXT | vocab | changed
    return {key: rule(key, shape, c["salt"]) for key, shape in text_shapes(c).items()}


@cache
def pieces(kind: str = "unigram", size: int = 160) -> bytes:
    """A SentencePiece model, trained on the spot; its unknown piece has number 0."""
    import sentencepiece

    draw, made = random.Random(0), io.BytesIO()
    words = "a photo of the large small bad many itap art origami video game in dog cat road sky"
    words += " person tree traffic light chest drawers étagère naïve straße"
    ends = ("", "s", "ing", ".", "er")
    lines = (
        " ".join(draw.choice(words.split()) + draw.choice(ends) for _ in range(8))
        for _ in range(2000)
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=made,
        vocab_size=size,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return made.getvalue()


def vocab_size(model: bytes) -> int:
    """Pieces of a SentencePiece model."""
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())


def model_of(c: dict[str, Any], **settings: Any) -> Any:
    """A model in torch with the weights of a case."""
    from zsseg_rt import models

    towers = {"vision": vision(**c)}
    return models.from_official("tips", towers, num_heads=c["heads"], **settings)
