"""The small CLIP that ships with the package, which knows drawings of a synthetic world.

Its file holds float16 weights and only the token embeddings that its training saw; the other rows
of CLIP's table become zeros. :mod:`tools.studies.packed_clip` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.errors import CheckpointError

NAME = "demo"
"""What configurations and :func:`zsseg_rt.torch_files.clip_weights.load_clip` call it."""

SPACE = "small CLIP of the synthetic world"

FILE = Path(__file__).parents[1] / "models/clip/demo.safetensors"
_VOCAB_SIZE = 49408  # CLIP's


def is_shipped(source: str | Path) -> bool:
    """Whether a source of CLIP weights is the name of the shipped one, and no file is called so."""
    return str(source) == NAME and not Path(source).is_file()


def read_arrays(path: Path = FILE) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a packed CLIP, by default the one that ships with the package.

    Returns:
        Tensors float32 by open_clip's keys; ``words``, of which class names may be made, and
        ``prompt_words``, further ones that training saw.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            words = json.loads((file.metadata() or {})["words"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        rows, ids = tensors["token_embedding.weight"], tensors.pop("token_ids")
        table = np.zeros((_VOCAB_SIZE, rows.shape[1]), np.float32)
        table[ids] = rows
    except (OSError, SafetensorError, KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the small CLIP that ships with the package, got {error!r}. Install "
            "the package again, or make it with tools/make_demo.py."
        ) from error
    arrays = {key: t.astype(np.float32) for key, t in tensors.items()}
    return arrays | {"token_embedding.weight": table}, {
        "words": tuple(words["names"]),
        "prompt_words": tuple(words["prompts"]),
    }
