"""Read reference vectors, and compare with them, the same way for every system."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL_TOLERANCE = 1e-5  # relative to max(1, |x|max); the README of the vectors recommends it
REAL_TOLERANCE = 5e-5
MIN_AGREEMENT = 0.9999


def load(shared_dir: Path, name: str) -> Any:
    """Open one file of reference vectors."""
    return np.load(shared_dir / "golden" / name, allow_pickle=False)


def config_of(vectors: Any) -> dict[str, Any]:
    """The settings the vectors were made with."""
    return json.loads(str(vectors["config_json"]))


def arguments_of(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments that ``from_official`` cannot read from the small files' shapes."""
    return {
        "num_heads": config["heads"],
        "decoder_heads": config["dec_heads"],
        "text_heads": config["txt"]["transformer_heads"],
        "image_size": config["img"],
        "seen_classes": config["seen"],
    }


def state_dict_of(vectors: Any) -> dict[str, Tensor]:
    """The official ``state_dict`` that the small files hold."""
    prefix = "sd/"
    keys = [key for key in vectors.files if key.startswith(prefix)]
    return {key.removeprefix(prefix): torch.from_numpy(vectors[key]) for key in keys}


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = SMALL_TOLERANCE) -> None:
    """Equal shape, and an error within the tolerance relative to ``max(1, |expected|max)``."""
    assert tuple(actual.shape) == expected.shape
    error = np.abs(np.asarray(actual) - expected).max() / max(1.0, np.abs(expected).max())
    assert error <= tolerance


def case_of(vectors: Any, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and settings of a case."""
    arrays = {k.partition("/")[2]: vectors[k] for k in vectors.files if k.startswith(f"{case}/")}
    return arrays, json.loads(str(arrays.pop("config_json")))
