"""CLIP's weights by file or by open_clip's tag, and its towers built from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models.clip.towers import (
    Activation,
    ImageEncoder,
    ImageEncoderConfig,
    TextEncoder,
    TextEncoderConfig,
    resize_positional_embedding,
)
from zsseg_rt.torch_files.checkpoints import load_weights
from zsseg_rt.torch_files.clip_arrays import ClipTensors, is_shipped, read_clip, sort_by_tower
from zsseg_rt.torch_files.clip_layouts import Settings, as_clip
from zsseg_rt.torch_files.shapes import Checked, divisor

ClipActivation = Literal["quick_gelu", "gelu"]
C = TypeVar("C")
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def load_clip(
    source: str | Path,
    *,
    architecture: str = "ViT-B-16",
    activation: ClipActivation | None = None,
    num_heads: int | None = None,
    text_heads: int | None = None,
) -> ClipTensors:
    """Load CLIP weights.

    Args:
        source: A file (OpenAI's TorchScript archive, or a ``state_dict`` with the keys of open_clip
            or of transformers' ``CLIPModel`` in whatever a training run saved), a pretrained tag of
            open_clip such as ``"openai"``, or ``"demo"``: the small CLIP that ships.
        architecture: open_clip's name of the model, for a tag.
        activation: The MLPs', for a file of which it is not known, without a ``config.json``.
        num_heads: Heads of the image tower; None is one per 64 channels, which is right for ViT-B
            and ViT-L but not for ViT-H and larger, unless files beside the weights say it.
        text_heads: Heads of the text tower; likewise.

    Raises:
        CheckpointError: The source cannot be read, is not a CLIP ViT, or its activation is unknown.
        BackendUnavailableError: A tag is given and open_clip is not installed.
    """
    path = Path(source)
    if path.is_file() or is_shipped(source):
        weights = _checked(read_clip(source, any_vocabulary=True), path.name)
    elif path.suffix in {".pt", ".pth", ".bin", ".safetensors", ".ckpt"}:
        raise CheckpointError(f"source: expected a CLIP file, got {path}. Check the path.")
    else:
        weights = _load_tag(str(source), architecture)
    settings = weights.settings
    if (kind := activation or weights.known_activation()) is None:
        raise CheckpointError(
            "activation: expected 'quick_gelu' or 'gelu', got None. A state_dict does not say; "
            "OpenAI's, MetaCLIP's and DFN's weights use 'quick_gelu', most others 'gelu'."
        )
    settings = settings._replace(
        activation=kind,
        num_heads=settings.num_heads if num_heads is None else num_heads,
        text_heads=settings.text_heads if text_heads is None else text_heads,
    )
    return replace(weights, settings=settings)


def _load_tag(tag: str, architecture: str) -> ClipTensors:
    open_clip = _import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise CheckpointError(
            f"source: expected a file or a pretrained tag of {architecture} "
            f"({', '.join(tags) or 'which open_clip does not know'}), got '{tag}'. "
            "Check the spelling."
        )
    try:
        model = open_clip.create_model(architecture, pretrained=tag)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"source: expected to download '{tag}' of {architecture}, got {type(error).__name__}. "
            "Connect to the network, or pass a local file."
        ) from error
    config = open_clip.pretrained.get_pretrained_cfg(architecture, tag)
    colours = {key: tuple(config.get(key) or ()) for key in ("mean", "std")}
    return _weights_of(model, tag, **colours)


def random_clip(architecture: str = "ViT-B-16") -> ClipTensors:
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


def _weights_of(model: Any, name: str, **colours: tuple[float, ...]) -> ClipTensors:
    text = getattr(model, "text", model)
    pooling = getattr(text, "pool_type", getattr(model, "text_pool_type", "argmax"))
    if pooling != "argmax":
        raise CheckpointError(
            f"{name}: expected a text tower that is read at its largest token id, as CLIP's, got "
            f"pooling '{pooling}'. Use weights with CLIP's own tokenizer."
        )
    quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    settings = Settings(
        activation="quick_gelu" if quick else "gelu",
        num_heads=model.visual.transformer.resblocks[0].attn.num_heads,
        text_heads=text.transformer.resblocks[0].attn.num_heads,
        **colours,
    )
    return replace(clip_of_tensors(model.state_dict(), name), settings=settings)


def _import_open_clip() -> Any:
    with needs_extra("train", "for a pretrained tag (or pass a local file)"):
        import open_clip
    return open_clip


def clip_of_tensors(state_dict: Mapping[str, Tensor], name: str) -> ClipTensors:
    """The towers of a whole CLIP in any layout."""
    arrays = {key: value.detach().float().numpy() for key, value in state_dict.items()}
    return _checked(sort_by_tower(as_clip(arrays, name), name, any_vocabulary=True), name)


def _checked(weights: ClipTensors, name: str) -> ClipTensors:
    if weights.kind != "clip":
        raise CheckpointError(
            f"{name}: expected a CLIP with a ViT, of OpenAI, open_clip or transformers, got "
            "another kind of towers. PE-Core and SigLIP are exported from a file, not trained."
        )
    return weights


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

    def load(self) -> ClipTensors:
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


# --- towers ---


def image_config(weights: ClipTensors) -> ImageEncoderConfig:
    """Sizes of the image tower; it has no prompts."""
    file, settings = Checked(tensors=weights.visual.tensors, what="CLIP"), weights.settings
    return image_encoder_config(file, "", settings.num_heads, settings.activation)


def text_config(weights: ClipTensors) -> TextEncoderConfig:
    """Sizes of the text tower."""
    file, settings = Checked(tensors=weights.text.tensors, what="CLIP"), weights.settings
    config = text_encoder_config(file, "", settings.text_heads, settings.activation)
    return replace(config, words=weights.words, prompt_words=weights.prompt_words)


def image_encoder_config(
    file: Checked, prefix: str = "", num_heads: int | None = None, activation: str | None = None
) -> ImageEncoderConfig:
    """Read an image tower's sizes from shapes; it has no prompts."""
    width, _, patch_size, _ = file.shape(prefix + "conv1.weight", 4)
    return ImageEncoderConfig(
        width=width,
        num_layers=file.depth(prefix + "transformer.resblocks."),
        num_heads=divisor("num_heads", num_heads, width),
        mlp_width=file.shape(prefix + "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        embed_dim=file.shape(prefix + "proj", 2)[1],
        patch_size=patch_size,
        grid_side=file.grid_side(prefix + "positional_embedding", 2),
        activation=cast(Activation, activation or "quick_gelu"),
        num_prompts=0,
        num_deep_prompts=0,
    )


def text_encoder_config(
    file: Checked, prefix: str = "", num_heads: int | None = None, activation: str | None = None
) -> TextEncoderConfig:
    """Read a text tower's sizes from shapes."""
    vocab_size, width = file.shape(prefix + "token_embedding.weight", 2)
    return TextEncoderConfig(
        vocab_size=vocab_size,
        context_length=file.shape(prefix + "positional_embedding", 2)[0],
        width=width,
        num_layers=file.depth(prefix + "transformer.resblocks."),
        num_heads=divisor("text_heads", num_heads, width),
        mlp_width=file.shape(prefix + "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        embed_dim=file.shape(prefix + "text_projection", 2)[1],
        activation=cast(Activation, activation or "quick_gelu"),
    )


def load_into(
    make: Callable[[C], M],
    config: C,
    state_dict: Mapping[str, Any],
    *,
    architecture: str,
    ignored: Sequence[str] = (),
) -> M:
    """A module of these sizes with copies of these weights, in evaluation mode."""
    with torch.device("meta"):
        model = make(config)
    load_weights(model, state_dict, architecture=architecture, ignored=ignored)
    return model.eval()


def start_from_clip(model: M, weights: ClipTensors, image: str = "image_encoder") -> M:
    """Copy CLIP's towers into a model, its positions resized to the model's grid."""
    tower, name = getattr(model, image), "positional_embedding"
    grid_hw = (tower.config.grid_side,) * 2
    rows = torch.as_tensor(weights.visual[name])
    rows = resize_positional_embedding(rows, grid_hw, tower.position_mode)
    towers: dict[str, Any] = {image: {**weights.visual, name: rows}, "text_encoder": weights.text}
    load_weights(model, model.state_dict() | by_tower(towers), architecture="CLIP")
    return model.eval()


def by_tower(towers: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """The weights of several towers, with the towers' names before their keys."""
    return {f"{name}.{key}": v for name, tower in towers.items() for key, v in tower.items()}


def build_image_encoder(weights: ClipTensors) -> ImageEncoder:
    """Build the plain image tower, in evaluation mode.

    Raises:
        CheckpointError: The weights are not a ViT's.
    """
    what = "CLIP's image tower"
    encoder = load_into(ImageEncoder, image_config(weights), weights.visual, architecture=what)
    return encoder.requires_grad_(False)


def build_text_encoder(weights: ClipTensors) -> TextEncoder:
    """Build the text tower, in evaluation mode.

    Raises:
        CheckpointError: The weights are not a CLIP text transformer's.
    """
    what = "CLIP's text tower"
    encoder = load_into(TextEncoder, text_config(weights), weights.text, architecture=what)
    return encoder.requires_grad_(False)
