"""The reference vectors of ZegCLIP and CLIP-RC, each with the model they were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support import tiny
from support.golden import arguments_of, config_of, load, state_dict_of
from zsseg_rt.models import from_official

# What the two systems' files are called, and what the vectors' models are built without.
FILES = {"zegclip": "zegclip", "clip_rc": "cliprc"}
_SKIPPED = {
    "zegclip": ("text_encoder.",),
    "clip_rc": ("text_encoder.", "decode_head.recovery_decoder."),
}


class SmallCase:
    """The small vectors, which hold every intermediate."""

    def __init__(self, shared_dir: Path, architecture: str) -> None:
        self.architecture = architecture
        self.golden = load(shared_dir, f"{FILES[architecture]}_small_public.npz")
        self.config = config_of(self.golden)
        self.state_dict = state_dict_of(self.golden)
        self.model = self.build()
        self.image = torch.from_numpy(self.golden["image"])
        self.text = torch.from_numpy(self.golden["text_embeddings"])

    def build(self, **settings: Any) -> Any:
        """The model with some settings changed."""
        arguments = arguments_of(self.config) | settings
        return from_official(self.architecture, self.state_dict, **arguments)


class RealCase:
    """Vectors at the official size, and the model of their rule."""

    def __init__(self, shared_dir: Path, architecture: str, dataset: str) -> None:
        self.golden = load(shared_dir, f"{FILES[architecture]}_real_{dataset}_public.npz")
        config = config_of(self.golden)
        shapes = official_layouts(shared_dir, architecture)[config["config"]]["shapes"]
        skipped = _SKIPPED[architecture]
        shapes = {key: size for key, size in shapes.items() if not key.startswith(skipped)}
        state_dict = tiny.rule_state_dict(shapes, config["salt"], config["gains"])
        self.model = from_official(architecture, state_dict, seen_classes=config["seen"])
        num_classes = self.golden["low_logits"].shape[1]
        self.text: Tensor = tiny.text_embeds(num_classes, 512, config["salt"])
        self.image: Tensor = tiny.image(1, 3, 512, 512, salt=config["salt"])


def official_layouts(shared_dir: Path, architecture: str) -> dict[str, Any]:
    """Keys, shapes and parameter counts of the official checkpoints, by name."""
    path = shared_dir / "specs" / f"statedict_{FILES[architecture]}.json"
    return json.loads(path.read_text())


def unread(key: str) -> bool:
    """Whether it names a tensor of official checkpoints that no forward pass reads."""
    return "self_attn." in key or "norm1." in key
