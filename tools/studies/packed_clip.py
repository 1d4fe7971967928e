"""Pack the small CLIP for the package: float16, and only the tokens that its training saw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from tools.scenes import words_of_world
from tools.scenes.captions import FUNCTION_WORDS
from zsseg_rt.common.files import write_whole
from zsseg_rt.export.words import tokenizer_json
from zsseg_rt.models.clip.weights import load_clip, text_config
from zsseg_rt.text.tokenizer import Tokenizer

__all__ = ["pack_clip"]


def pack_clip(clip: Path, path: Path) -> Path:
    """Write ``clip.safetensors`` of a pretraining in the form that ships with the package.

    Args:
        clip: Weights of :func:`tools.studies.clip_pretraining.pretrain`.
        path: File to write; ``zsseg_rt/models/clip/demo.safetensors`` of the project.

    Returns:
        ``path``.

    Raises:
        CheckpointError: The weights cannot be read or are not a CLIP ViT's.
    """
    weights = load_clip(clip, activation="quick_gelu")
    words, prompt_words = words_of_world(), FUNCTION_WORDS
    tokenizer = Tokenizer(tokenizer_json(), context_length=text_config(weights).context_length)
    ids = np.unique(tokenizer.encode([*words, *prompt_words]))
    tensors = weights.named()
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][ids]
    packed = {key: np.ascontiguousarray(value, np.float16) for key, value in tensors.items()}
    with safe_open(clip, framework="np") as file:
        provenance = (file.metadata() or {}).get("provenance", "{}")
    about = {
        "words": json.dumps({"names": words, "prompts": prompt_words}),
        "provenance": provenance,
        "licence": "Apache-2.0",
    }
    write_whole(path, save({**packed, "token_ids": ids}, about))
    return path
