"""CLIP weights: where they come from, sorted by tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.torch_files.clip_arrays import (
    CLIP_MEAN,
    CLIP_STD,
    read_clip_arrays,
    sort_by_tower,
    tower_sizes,
)
from zsseg_rt.torch_files.clip_layouts import as_clip, settings_beside
from zsseg_rt.torch_files.shapes import Array
from zsseg_rt.torch_files.shipped_clip import is_shipped, read_arrays
from zsseg_rt.torch_files.weights import is_torchscript

ClipActivation = Literal["quick_gelu", "gelu"]
Activation = Literal[ClipActivation, "relu"]
"""Of MLPs; ``"relu"`` is the text tower's of TIPS."""
Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ClipWeights:
    """Weights of a CLIP ViT, float32."""

    visual: dict[str, Tensor]  # Image tower: conv1.weight, transformer.resblocks.0...
    text: dict[str, Tensor]  # Text tower: token_embedding.weight, transformer.resblocks.0...
    activation: Activation  # The MLPs' activation
    num_heads: int | None = None  # Heads of the image tower; None is one per 64 channels
    text_heads: int | None = None  # Heads of the text tower; None is one per 64 channels
    # Logarithm of the factor on cosines; None if the weights do not hold it
    logit_scale: float | None = None
    words: tuple[str, ...] = ()  # Of the text tower; see TextEncoderConfig
    prompt_words: tuple[str, ...] = ()


def load_clip(
    source: str | Path,
    *,
    architecture: str = "ViT-B-16",
    activation: Activation | None = None,
    num_heads: int | None = None,
    text_heads: int | None = None,
) -> ClipWeights:
    """Load CLIP weights.

    Args:
        source: A file (OpenAI's TorchScript archive, or a ``state_dict`` with the keys of open_clip
            or of transformers' ``CLIPModel`` in whatever a training run saved), a pretrained tag of
            open_clip such as ``"openai"``, or ``"demo"``: the small CLIP that ships.
        architecture: open_clip's name of the model, for a tag.
        activation: The MLPs', for a file that neither says it nor has a ``config.json`` beside it.
        num_heads: Heads of the image tower, for a file; None is one per 64 channels, which is right
            for ViT-B and ViT-L but not for ViT-H and larger.
        text_heads: Heads of the text tower, for a file; None is one per 64 channels.

    Raises:
        CheckpointError: The source cannot be read, is not a CLIP ViT, or does not state its
            activation.
        BackendUnavailableError: A tag is given and open_clip is not installed.
    """
    path = Path(source)
    if is_shipped(source):
        arrays, words = read_arrays()
        return replace(_sorted(arrays, "quick_gelu", "demo"), **words)
    if not path.is_file():
        if path.suffix in {".pt", ".pth", ".bin", ".safetensors", ".ckpt"}:
            raise CheckpointError(f"source: expected a CLIP file, got {path}. Check the path.")
        return _load_tag(str(source), architecture)
    weights = _sorted(read_clip_arrays(path), "gelu", path.name)
    towers: dict[str, Any] = {"vision": weights.visual, "text": weights.text}
    settings = settings_beside(path, {name: tower_sizes(tower) for name, tower in towers.items()})
    if activation is None and is_torchscript(path):
        activation = "quick_gelu"
    activation = activation or cast(Any, settings.activation)
    if activation is None:
        raise CheckpointError(
            "activation: expected 'quick_gelu' or 'gelu', got None. A state_dict does not say; "
            "OpenAI's, MetaCLIP's and DFN's weights use 'quick_gelu', most others 'gelu'."
        )
    return replace(
        weights,
        activation=activation,
        num_heads=settings.num_heads if num_heads is None else num_heads,
        text_heads=settings.text_heads if text_heads is None else text_heads,
    )


def _load_tag(tag: str, architecture: str) -> ClipWeights:
    open_clip = _import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise CheckpointError(
            f"source: expected a file or a pretrained tag of {architecture} "
            f"({', '.join(tags) or 'which open_clip does not know'}), got '{tag}'. "
            "Check the spelling."
        )
    try:
        return _weights_of(open_clip.create_model(architecture, pretrained=tag), tag)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"source: expected to download '{tag}' of {architecture}, got {type(error).__name__}. "
            "Connect to the network, or pass a local file."
        ) from error


def random_clip(architecture: str = "ViT-B-16") -> ClipWeights:
    """Untrained weights by open_clip's own initialisation, from torch's global generator."""
    open_clip = _import_open_clip()
    exists = architecture in open_clip.list_models()
    config = open_clip.get_model_config(architecture) if exists else {}
    layers = config.get("vision_cfg", {}).get("layers")
    if not isinstance(layers, int) or "hf_model_name" in config["text_cfg"]:
        raise CheckpointError(
            f"clip: expected an open_clip ViT such as 'ViT-B-16', got '{architecture}'. "
            "Towers of timm and Hugging Face and ResNets are not supported."
        )
    return _weights_of(open_clip.create_model(architecture), architecture)


def normalisation_of(source: str | Path, architecture: str) -> tuple[Colour, Colour]:
    """Mean and standard deviation of RGB in ``[0, 1]`` that weights were trained with."""
    config: Mapping[str, Any] = {}
    if not (Path(source).is_file() or is_shipped(source)):
        config = _import_open_clip().pretrained.get_pretrained_cfg(architecture, str(source))
    mean, std = (config.get(key) for key in ("mean", "std"))
    return tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD)


def _weights_of(model: Any, name: str) -> ClipWeights:
    quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    weights = split_towers(model.state_dict(), "quick_gelu" if quick else "gelu", name)
    text = getattr(model, "text", model)
    pooling = getattr(text, "pool_type", getattr(model, "text_pool_type", "argmax"))
    if pooling != "argmax":
        raise CheckpointError(
            f"{name}: expected a text tower that is read at its largest token id, as CLIP's, got "
            f"pooling '{pooling}'. Use weights with CLIP's own tokenizer."
        )
    return replace(
        weights,
        num_heads=model.visual.transformer.resblocks[0].attn.num_heads,
        text_heads=text.transformer.resblocks[0].attn.num_heads,
    )


def _import_open_clip() -> Any:
    with needs_extra("train", "for a pretrained tag (or pass a local file)"):
        import open_clip
    return open_clip


def split_towers(
    state_dict: Mapping[str, Tensor], activation: Activation, name: str
) -> ClipWeights:
    """Sort the keys of a whole CLIP by tower."""
    arrays = {key: value.detach().float().numpy() for key, value in state_dict.items()}
    return _sorted(as_clip(arrays, name), activation, name)


def _sorted(arrays: Mapping[str, Array], activation: Activation, name: str) -> ClipWeights:
    visual, text, unknown = sort_by_tower(arrays)
    if unknown or "class_embedding" not in visual or "attn_pool.probe" in visual or not text:
        raise CheckpointError(
            f"{name}: expected CLIP ViT keys such as 'visual.class_embedding' and "
            f"'token_embedding.weight', got {', '.join((unknown or list(arrays))[:5])}. "
            "Use a CLIP with a ViT, of OpenAI, open_clip or transformers; PE-Core and SigLIP are "
            "exported from a file, not trained."
        )
    scale = arrays.get("logit_scale")
    return ClipWeights(
        visual={key: torch.from_numpy(array) for key, array in visual.items()},
        text={key: torch.from_numpy(array) for key, array in text.items()},
        activation=activation,
        logit_scale=None if scale is None else float(np.ravel(scale)[0]),
    )


@dataclass(frozen=True, kw_only=True)
class ClipSource(ABC):
    """CLIP weights by tag or file; what builds a model from them has its settings beside these."""

    pretrained: str | Path | None  # A file or an open_clip tag; see :func:`load_clip`
    clip: str = "ViT-B-16"  # open_clip's name of the model, for a tag
    activation: ClipActivation | None = None  # For a state_dict file, which does not store it
    # Heads of the image tower, for a file; None is one per 64 channels
    num_heads: int | None = None
    # Heads of the text tower, for a file; None is one per 64 channels
    text_heads: int | None = None

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the model, in evaluation mode."""

    def load(self) -> ClipWeights:
        """Read the weights."""
        if self.pretrained is None:
            raise ArgumentError(
                "pretrained: expected a CLIP file or an open_clip tag, got None. Name one."
            )
        return load_clip(
            self.pretrained,
            architecture=self.clip,
            activation=self.activation,
            num_heads=self.num_heads,
            text_heads=self.text_heads,
        )
