"""A CLIP small enough to train on the captions of the synthetic world in minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.clip.towers import (
    ImageEncoder,
    ImageEncoderConfig,
    TextEncoder,
    TextEncoderConfig,
    unit,
)
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD

__all__ = ["PretrainingConfig", "SmallClip"]


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Settings of a run.

    Attributes:
        steps: Optimizer steps.
        seed: Seed of the world, the initial weights and every other choice.
        batch_size: Closer views per step; half as many whole scenes.
        view_size: Side of closer views in pixels.
        size: Side of whole scenes in pixels.
        whole_every: One step in this many sees whole scenes.
        learning_rate: Peak of the cosine schedule.
        warmup_steps: Steps of linear warm-up, fewer than ``steps``; None is 100, in runs of fewer
            than 400 steps a quarter of them.
        checkpoint_interval: Steps between checkpoints.
        weight_decay: Weight decay of matrices; vectors have none.
        patch_weight: Weight of the second contrastive term, which compares captions with the mean
            of the patch embeddings and so keeps patches in the joint space.
        width: Width of the image tower.
        num_layers: Layers of the image tower.
        text_width: Width of the text tower.
        text_layers: Layers of the text tower.
        embed_dim: Width of the joint space.
        context_length: Tokens per caption.
    """

    steps: int = 1900
    seed: int = 0
    batch_size: int = 256
    view_size: int = 64
    size: int = 128
    whole_every: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    checkpoint_interval: int = 100
    weight_decay: float = 0.05
    patch_weight: float = 0.5
    width: int = 128
    num_layers: int = 6
    text_width: int = 128
    text_layers: int = 3
    embed_dim: int = 128
    context_length: int = 24

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "whole_every", "num_layers", "text_layers"):
            if getattr(self, name) < 1:
                raise ArgumentError(
                    f"{name}: expected at least 1, got {getattr(self, name)}. Choose a larger one."
                )
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(100, self.steps // 4))
        if not 0 <= self.warmup < max(self.steps, 2):
            raise ArgumentError(
                f"warmup_steps: expected 0 to {self.steps - 1}, fewer than the {self.steps} steps, "
                f"got {self.warmup_steps}. Leave it out for a quarter of a short run."
            )
        for name in ("width", "text_width"):
            if getattr(self, name) % 64:
                raise ArgumentError(
                    f"{name}: expected a multiple of 64, a head's width, got {getattr(self, name)}."
                    " Choose another."
                )
        for name in ("view_size", "size"):
            if getattr(self, name) % 16:
                raise ArgumentError(
                    f"{name}: expected a multiple of the patch size 16, got {getattr(self, name)}."
                    " Choose another."
                )

    @property
    def warmup(self) -> int:
        """``warmup_steps`` as a number."""
        assert self.warmup_steps is not None
        return self.warmup_steps


class _WindowedImageEncoder(ImageEncoder):
    """An image tower that treats smaller images as random windows of the whole."""

    def patch_positions(self, grid_hw: tuple[int, int]) -> Tensor:
        side = self.config.grid_side
        rows = side - grid_hw[0] + 1, side - grid_hw[1] + 1
        if min(rows) < 1:
            return super().patch_positions(grid_hw)
        y, x = (int(torch.randint(count, ()).item()) for count in rows)
        grid = torch.unflatten(self.positional_embedding[1:], 0, (side, side))
        return grid[y : y + grid_hw[0], x : x + grid_hw[1]].flatten(0, 1)


class SmallClip(nn.Module):
    """Both towers and the temperature; patch size 16, one attention head per 64 channels.

    Args:
        config: Sizes.
    """

    def __init__(self, config: PretrainingConfig) -> None:
        super().__init__()
        self.visual = _WindowedImageEncoder(
            ImageEncoderConfig(
                width=config.width,
                num_layers=config.num_layers,
                num_heads=config.width // 64,
                mlp_width=4 * config.width,
                embed_dim=config.embed_dim,
                grid_side=config.size // 16,
            )
        )
        self.text = TextEncoder(
            TextEncoderConfig(
                context_length=config.context_length,
                width=config.text_width,
                num_layers=config.text_layers,
                num_heads=config.text_width // 64,
                mlp_width=4 * config.text_width,
                embed_dim=config.embed_dim,
            )
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed images.

        Args:
            images: RGB, uint8 ``[B, 3, H, W]``.

        Returns:
            Class embeddings and means of patch embeddings, ``[B, D]``, unit norm.
        """
        mean, std = (images.new_tensor(v, dtype=torch.float32) for v in (CLIP_MEAN, CLIP_STD))
        normalized = (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        patch_embeds, cls_embed, _ = self.visual(normalized)
        return cls_embed, unit(patch_embeds.mean(dim=1))

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Embed captions, int64 ``[T, L]`` to ``[T, D]``, unit norm."""
        longest = int((tokens != 0).sum(dim=1).max().item())
        return unit(self.text.embed(tokens[:, :longest]))

    def open_clip_state_dict(self) -> dict[str, Tensor]:
        """Weights under open_clip's names."""
        return {
            **{f"visual.{key}": value for key, value in self.visual.state_dict().items()},
            **self.text.state_dict(),
            "logit_scale": self.logit_scale.detach(),
        }

    def load_open_clip_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Undo :meth:`open_clip_state_dict`."""
        own = {
            key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}": value
            for key, value in state_dict.items()
        }
        self.load_state_dict(own)
