"""Train a small CLIP on the captions of the synthetic world.

``python -m zsseg_rt.training.clip_pretraining --out FOLDER`` writes ``clip.safetensors`` in
open_clip's layout, which :func:`zsseg_rt.models.clip.load_clip` reads with
``activation="quick_gelu"``. An interrupted run goes on where its last checkpoint was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zsseg_rt.errors import ArgumentError, TrainingError
from zsseg_rt.models.clip import CLIP_MEAN, CLIP_STD
from zsseg_rt.models.image_encoder import ImageEncoder, ImageEncoderConfig, unit
from zsseg_rt.models.text_encoder import TextEncoder, TextEncoderConfig
from zsseg_rt.training.caption_batches import CaptionBatch, CaptionBatches
from zsseg_rt.training.datasets.scenes import WORLD_VERSION

__all__ = ["PretrainingConfig", "SmallClip", "contrastive_loss", "pretrain"]

_log = logging.getLogger(__name__)

WEIGHTS, STATE = "clip.safetensors", "training_state.pt"
_MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """What a run is.

    Attributes:
        steps: Optimizer steps.
        seed: Of the world, the initial weights and every other choice.
        batch_size: Closer views a step; whole scenes are half as many.
        view_size: Side of closer views in pixels.
        size: Side of whole scenes in pixels.
        whole_every: Every which step sees whole scenes.
        learning_rate: Peak of the cosine schedule.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Of matrices; vectors have none.
        patch_weight: Weight of the second contrastive term, which compares captions with the mean
            of the patch embeddings and so keeps patches in the joint space.
        width: Of the image tower.
        num_layers: Of the image tower.
        text_width: Of the text tower.
        text_layers: Of the text tower.
        embed_dim: Width of the joint space.
        context_length: Tokens a caption.
    """

    steps: int = 2400
    seed: int = 0
    batch_size: int = 256
    view_size: int = 64
    size: int = 128
    whole_every: int = 4
    learning_rate: float = 1e-3
    warmup_steps: int = 150
    weight_decay: float = 0.05
    patch_weight: float = 0.5
    width: int = 192
    num_layers: int = 6
    text_width: int = 128
    text_layers: int = 3
    embed_dim: int = 128
    context_length: int = 24

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "whole_every", "num_layers", "text_layers"):
            if getattr(self, name) < 1:
                raise ArgumentError(
                    f"{name}: expected at least 1, got {getattr(self, name)}. Choose more."
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


class _WindowedImageEncoder(ImageEncoder):
    """An image tower that takes smaller pictures as random windows of the whole."""

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
        """Embed pictures.

        Args:
            images: RGB, uint8 ``[B, 3, H, W]``.

        Returns:
            Class embeddings and means of patch embeddings, ``[B, D]``, unit norm.
        """
        mean, std = (images.new_tensor(v, dtype=torch.float32) for v in (CLIP_MEAN, CLIP_STD))
        normalized = (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        patch_embeds, cls_embed = self.visual(normalized)
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


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, caption_of: Tensor, logit_scale: Tensor
) -> Tensor:
    """Tell each picture's caption from the others', and each caption's picture.

    The mean of two cross-entropies over ``logit_scale * image . text``. Other pictures with the
    same caption are neither right nor wrong: they are left out.

    Args:
        image_embeds: ``[B, D]``, unit norm.
        text_embeds: Embeddings of the U distinct captions, ``[U, D]``, unit norm.
        caption_of: Which caption each picture has, int64 ``[B]``.
        logit_scale: Inverse temperature.

    Returns:
        A scalar.

    Source:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        ICML 2021.
    """
    logits = logit_scale * image_embeds @ text_embeds[caption_of].T
    twins = caption_of[:, None] == caption_of[None, :]
    twins.fill_diagonal_(False)
    logits = logits.masked_fill(twins, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def losses(model: SmallClip, batch: CaptionBatch, patch_weight: float) -> dict[str, Tensor]:
    """The weighted terms of a batch's loss; their sum is what is minimised."""
    cls_embeds, mean_embeds = model.encode_images(batch.images)
    text_embeds = model.encode_texts(batch.tokens)
    scale = model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
    terms = {"contrastive": contrastive_loss(cls_embeds, text_embeds, batch.caption_of, scale)}
    if patch_weight:
        patches = contrastive_loss(mean_embeds, text_embeds, batch.caption_of, scale)
        terms["patches"] = patch_weight * patches
    return terms


def learning_rate_factor(step: int, config: PretrainingConfig) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass
class _Run:
    """Everything that a checkpoint keeps."""

    config: PretrainingConfig
    model: SmallClip
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def train_step(self, batch: CaptionBatch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * learning_rate_factor(self.step, self.config)
        loss = torch.stack(list(losses(self.model, batch, self.config.patch_weight).values())).sum()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"loss: expected a finite number at step {self.step}, got {loss.item()}. The last "
                "checkpoint is kept; lower the learning rate and start again."
            )
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.item())

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        metadata = {"provenance": json.dumps(self.provenance())}
        weights = {k: v.contiguous() for k, v in self.model.open_clip_state_dict().items()}
        state = {"optimizer": self.optimizer.state_dict(), "step": self.step}
        state |= {"seconds": self.seconds, "history": self.history, "rng": torch.get_rng_state()}
        state["weights"] = weights  # of the same step as the optimizer, whatever happens between
        torch.save(state, folder / f"{STATE}.new")
        (folder / f"{STATE}.new").replace(folder / STATE)
        save_file(weights, folder / f"{WEIGHTS}.new", metadata)
        (folder / f"{WEIGHTS}.new").replace(folder / WEIGHTS)

    def resume(self, folder: Path) -> None:
        state: dict[str, Any] = torch.load(folder / STATE, weights_only=True)
        self.model.load_open_clip_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = state["history"]
        torch.set_rng_state(state["rng"])
        _log.info("resuming at step %d", self.step)

    def provenance(self) -> dict[str, Any]:
        return {
            "recipe": "zsseg_rt.training.clip_pretraining",
            "config": dataclasses.asdict(self.config),
            "world_version": WORLD_VERSION,
            "step": self.step,
            "seconds": round(self.seconds),
            "torch": torch.__version__,
        }


def pretrain(
    config: PretrainingConfig,
    folder: Path,
    *,
    checkpoint_seconds: float = 120.0,
    num_workers: int = 1,
) -> Path:
    """Train, or go on training, a small CLIP.

    Args:
        config: What the run is; the same when it is resumed.
        folder: Where checkpoints go, and where an earlier one is looked for.
        checkpoint_seconds: Time between checkpoints.
        num_workers: Processes that draw scenes; 0 draws in this one.

    Returns:
        The weights, ``clip.safetensors``.

    Raises:
        TrainingError: The loss is not finite, or the folder holds a run of another configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_same_run(config, folder)
    torch.manual_seed(config.seed)
    model = SmallClip(config)
    run = _Run(config, model, _optimizer(model, config))
    if (folder / STATE).is_file():
        run.resume(folder)
    last = time.monotonic()
    saved, losses_since = last, []
    for batch in _loader(config, run.step, num_workers):
        losses_since.append(run.train_step(batch))
        now = time.monotonic()
        run.seconds += now - last
        last = now
        if run.step % 20 == 0:
            _report(run, sum(losses_since) / len(losses_since))
            losses_since.clear()
        if now - saved > checkpoint_seconds:
            run.save(folder)
            saved = now
    run.save(folder)
    return folder / WEIGHTS


def _check_same_run(config: PretrainingConfig, folder: Path) -> None:
    path = folder / "config.json"
    wanted = dataclasses.asdict(config)
    if not path.is_file():
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(key for key in wanted if found.get(key) != wanted[key])
    if changed:
        raise TrainingError(
            f"{path}: expected the configuration of this run, got another {', '.join(changed)}. "
            "Choose another folder, or remove this one to start afresh."
        )


def _optimizer(model: SmallClip, config: PretrainingConfig) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def _loader(config: PretrainingConfig, start: int, num_workers: int) -> DataLoader[CaptionBatch]:
    batches = CaptionBatches(
        steps=config.steps,
        seed=config.seed,
        batch_size=config.batch_size,
        view_size=config.view_size,
        size=config.size,
        whole_every=config.whole_every,
        context_length=config.context_length,
    )
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, config.steps),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # else it draws from the one that a checkpoint keeps
    )


def _report(run: _Run, loss: float) -> None:
    rate = run.seconds / run.step
    remaining = rate * (run.config.steps - run.step)
    scale = float(run.model.logit_scale.detach().exp())
    run.history.append({"step": run.step, "loss": loss, "logit_scale": scale})
    _log.info(
        "step %d/%d: loss %.3f, logit scale %.1f, %.2f s a step, %.0f min left",
        *(run.step, run.config.steps, loss, scale, rate, remaining / 60),
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    for setting in dataclasses.fields(PretrainingConfig):
        kind = type(setting.default)
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}", type=kind, default=setting.default
        )
    arguments = vars(parser.parse_args())
    out, threads = arguments.pop("out"), arguments.pop("threads")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    _log.info("weights: %s", pretrain(PretrainingConfig(**arguments), out))


if __name__ == "__main__":
    main()
