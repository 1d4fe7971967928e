"""Decode heads alone, trained on features of a frozen CLIP that are computed once.

A head trains in a minute where a whole system takes many, so that rows, seeds and worlds can be
multiplied. Nothing in front of the head is trained: differences come from the head, its start and
its loss. ``tools/studies/compare_heads.py`` is the command.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.scenes import SceneDataset
from tools.studies.name_draws import DrawnScenes
from tools.studies.starts import HeadStart
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.models.base import lower_seen
from zsseg_rt.models.clip.towers import PromptedImageEncoder
from zsseg_rt.models.descriptor.builders import ZegCLIPStart
from zsseg_rt.models.descriptor.model import DecodeHead, DecoderConfig, Descriptor
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD
from zsseg_rt.training.class_embeddings import embed_phrases
from zsseg_rt.training.loop.config import poly
from zsseg_rt.training.tasks.labelled import PixelLossTask

__all__ = ["ROWS", "WORLDS", "Features", "HeadRow", "HeadSettings", "World", "cache_features"]
__all__ += ["open_world", "train_head"]

TEMPLATES = ("a photo of a {}.",)
_CHUNK = 64
_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class HeadRow:
    """A head and how it learns.

    Attributes:
        title: What tables call it.
        cosine: Whether it is the cosine head instead of the mask decoder.
        descriptor: What the decoder's queries are made of.
        start: The decoder's initial weights.
        copies: Whether all layers start as the first, as officially.
        loss: Settings of the loss; see :class:`zsseg_rt.training.tasks.labelled.PixelLossTask`.
        rotated: Whether patches are turned by a random rotation: the same information, without
            the match of patches and texts.
    """

    title: str
    cosine: bool = False
    descriptor: Descriptor = "relationship"
    start: HeadStart = field(default_factory=HeadStart)
    copies: bool = False
    loss: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({"loss": "masks"}))
    rotated: bool = False

    @property
    def softmax(self) -> bool:
        """Whether scores are a softmax over classes."""
        return bool(self.loss["loss"] == "cross_entropy")


_ENTROPY = MappingProxyType({"loss": "cross_entropy"})
_IGNORING = MappingProxyType({"loss": "masks", "unannotated": "ignore"})

ROWS: Mapping[str, HeadRow] = {
    "cosine": HeadRow(title="cosine head", cosine=True, loss=_ENTROPY),
    "cosine_rotated": HeadRow(
        title="cosine head, patches rotated", cosine=True, loss=_ENTROPY, rotated=True
    ),
    "cosine_masks": HeadRow(title="cosine head, focal and dice", cosine=True),
    "paper_baseline_fix": HeadRow(
        title="the paper's Baseline-Fix", descriptor="text", loss=_ENTROPY
    ),
    "zegclip": HeadRow(title="ZegCLIP"),
    "zegclip_rotated": HeadRow(title="ZegCLIP, patches rotated", rotated=True),
    "zegclip_cross_entropy": HeadRow(title="ZegCLIP, cross entropy", loss=_ENTROPY),
    "zegclip_ignored": HeadRow(title="ZegCLIP, unannotated left out", loss=_IGNORING),
    "zegclip_copies": HeadRow(title="ZegCLIP, layers start as copies", copies=True),
    "aligned": HeadRow(title="ZegCLIP, aligned start", start=HeadStart(aligned=True)),
    "aligned_offset": HeadRow(
        title="ZegCLIP, aligned start, offset -3.6", start=HeadStart(aligned=True, offset=-3.6)
    ),
    "aligned_cross_entropy": HeadRow(
        title="ZegCLIP, aligned start, cross entropy", start=HeadStart(aligned=True), loss=_ENTROPY
    ),
}

WORLDS: Mapping[str, Mapping[str, Any]] = {
    "as_published": {},
    "one_thing": {"things": 1},
    "all_names": {"annotated": "all"},
    "seen_pictures": {"split": "train_seen"},
}
"""Options of :class:`tools.scenes.SceneDataset` by name; ``split`` is the
training scenes'."""


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How every head is trained and judged.

    Attributes:
        steps: Optimizer steps.
        batch_size: Scenes per step.
        num_scenes: Training scenes.
        num_judged: Scenes of the ``val`` split.
        num_draws: Draws of other unseen names that heads are judged on too; see
            :class:`tools.studies.name_draws.DrawnScenes`.
        num_drawn: Scenes of each draw.
        learning_rate: Peak rate.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Of all weights.
        label_stride: The loss uses one row and column of labels in this many.
        seen_bias: What seen probabilities of the decoder's rows are lowered by, as officially.
    """

    steps: int = 1000
    batch_size: int = 16
    num_scenes: int = 3000
    num_judged: int = 200
    num_draws: int = 0
    num_drawn: int = 60
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    label_stride: int = 4
    seen_bias: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "num_scenes", "num_judged"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}.")
        if not 0 <= self.warmup_steps < max(self.steps, 2):
            raise ArgumentError(
                f"warmup_steps: expected fewer than the {self.steps} steps, got "
                f"{self.warmup_steps}. Shorten the warm-up."
            )


@dataclass(frozen=True, kw_only=True)
class Features:
    """A split's scenes as a frozen tower sees them.

    Attributes:
        patch_embeds: float16 ``[S, N, D]``, unit norm.
        cls_embeds: float32 ``[S, D]``, unit norm.
        labels: Of pixels, uint8 or uint16 ``[S, H, W]``.
    """

    patch_embeds: Tensor
    cls_embeds: Tensor
    labels: npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class World:
    """A world's features, and its classes.

    Attributes:
        train: Scenes to learn from.
        judged: Scenes of the ``val`` split.
        text_embeds: float32 ``[C, D]``, unit norm.
        seen: Indices of the seen classes.
        ignore_label: Label of unannotated pixels.
        drawn: Scenes and text embeddings of draws of other unseen names.
    """

    train: Features
    judged: Features
    text_embeds: Tensor
    seen: tuple[int, ...]
    ignore_label: int
    drawn: tuple[tuple[Features, Tensor], ...] = ()


def open_world(clip: str | Path, options: Mapping[str, Any], settings: HeadSettings) -> World:
    """Compute the features of a world; all rows and seeds share them.

    Images are normalised with CLIP's statistics for every row.

    Args:
        clip: CLIP weights: ``"demo"``, or a file of the small CLIP's pretraining.
        options: Of the data set; see :data:`WORLDS`.
        settings: How many scenes.

    Raises:
        ArgumentError: An option is out of range.
        CheckpointError: The weights cannot be read.
    """
    model = ZegCLIPStart(
        pretrained=clip, activation="quick_gelu", num_prompts=0, image_size=_SIZE
    ).build()
    assert model.text_encoder is not None
    others = dict(options)
    split = others.pop("split", "train")
    train = SceneDataset(split, size=_SIZE, length=settings.num_scenes, **others)
    judged = SceneDataset("val", size=_SIZE, length=settings.num_judged, **others)
    draws = [DrawnScenes(draw, length=settings.num_drawn) for draw in range(settings.num_draws)]
    encoder = model.text_encoder
    return World(
        train=cache_features(model.backbone, train),
        judged=cache_features(model.backbone, judged),
        text_embeds=embed_phrases(model.text_encoder, train.class_names, TEMPLATES),
        seen=train.seen,
        ignore_label=train.ignore_label,
        drawn=tuple(
            (
                cache_features(model.backbone, draw),
                embed_phrases(encoder, draw.class_names, TEMPLATES),
            )
            for draw in draws
        ),
    )


@torch.no_grad()
def cache_features(tower: PromptedImageEncoder, dataset: SceneDataset) -> Features:
    """Run a frozen tower over a data set."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    patches, classes, labels = [], [], []
    for start in range(0, len(dataset), _CHUNK):
        samples = [dataset[i] for i in range(start, min(start + _CHUNK, len(dataset)))]
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        found = tower((images.permute(0, 3, 1, 2).float() / 255 - mean) / std)
        patches.append(found.patch_embeds.half())
        classes.append(found.cls_embed)
        labels += [sample.labels for sample in samples]
    return Features(
        patch_embeds=torch.cat(patches), cls_embeds=torch.cat(classes), labels=np.stack(labels)
    )


class CosineHead(nn.Module):
    """A linear layer on patches that starts as the identity, and a logit scale.

    Args:
        embed_dim: Width D of the joint space.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(embed_dim, embed_dim, bias=False)
        nn.init.eye_(self.head.weight)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, patch_embeds: Tensor, cls_embed: Tensor, text_embeds: Tensor) -> Tensor:
        """Logits ``[B, C, N]``; the class embedding is not used."""
        patches = F.normalize(self.head(patch_embeds), dim=-1)
        return self.log_scale.exp() * (text_embeds @ patches.transpose(1, 2))


class _HeadTask(PixelLossTask):
    """A head on given features."""

    def losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See :meth:`PixelLossTask.losses`; ``images`` are mask logits ``[B, Q, gh, gw]``."""
        return self.pixel_losses(images, labels)

    def parameter_groups(self) -> list[dict[str, object]]:
        """One group."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]


def train_head(row: HeadRow, world: World, settings: HeadSettings, seed: int) -> dict[str, float]:
    """Train one head and judge it.

    Args:
        row: The head.
        world: Features.
        settings: Of the training.
        seed: Of the initial weights, the order of scenes, dropout and the rotation.

    Returns:
        Figures in percent, by name.
    """
    torch.manual_seed(seed)
    dim = world.text_embeds.shape[1]
    head, turn = _make_head(row, dim), _rotation(dim) if row.rotated else torch.eye(dim)
    task = _HeadTask(
        head,
        world.text_embeds,
        seen=world.seen,
        ignore_label=world.ignore_label,
        label_stride=settings.label_stride,
        **row.loss,
    )
    optimizer = torch.optim.AdamW(
        task.parameter_groups(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    head.train()
    for step, chosen in enumerate(_order(len(world.train.labels), settings)):
        rate = poly(
            step,
            max_steps=settings.steps,
            min_factor=0.005,
            warmup_steps=settings.warmup_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * settings.learning_rate
        labels = torch.from_numpy(world.train.labels[chosen.numpy()].astype(np.int64))
        logits = _logits(head, world.train, chosen, task.query_embeds, turn)
        loss = torch.stack(list(task.losses(logits, labels).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    head.eval()
    bias = 0.0 if row.cosine else settings.seen_bias

    def judged(features: Features, text: Tensor) -> dict[str, float]:
        counts = ConfusionMatrix(len(text), ignore_label=world.ignore_label)
        for index, labels in enumerate(features.labels):
            logits = _logits(head, features, torch.tensor([index]), text, turn)
            counts.update(labels, _labels(logits, labels, row, world.seen, bias))
        return score(counts.counts, world.seen).as_reported()

    with torch.no_grad():
        figures = judged(world.judged, world.text_embeds)
        others = [judged(features, text) for features, text in world.drawn]
    return figures | (_over_draws(others) if others else {})


def _make_head(row: HeadRow, dim: int) -> nn.Module:
    if row.cosine:
        return CosineHead(dim)
    head = DecodeHead(DecoderConfig(query_dim=dim, ffn_dim=4 * dim), dim, row.descriptor)
    head.scale_for_unit_inputs()
    if row.copies:
        head.decoder_1.copy_first_layer()
    row.start.apply(head)
    return head


def _rotation(dim: int) -> Tensor:
    turn: Tensor = torch.linalg.qr(torch.randn(dim, dim))[0]
    return turn


def _order(num_scenes: int, settings: HeadSettings) -> Iterator[Tensor]:
    """Indices of each step's scenes: a new order whenever all were seen."""
    size = min(settings.batch_size, num_scenes)
    order = torch.randperm(num_scenes)
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.randperm(num_scenes)
        yield order[:size]
        order = order[size:]


def _logits(head: nn.Module, features: Features, chosen: Tensor, text: Tensor, turn: Tensor) -> Any:
    patches = features.patch_embeds[chosen].float() @ turn
    side = math.isqrt(patches.shape[1])
    return head(patches, features.cls_embeds[chosen], text).unflatten(2, (side, side))


def _labels(
    logits: Tensor, truth: npt.NDArray[Any], row: HeadRow, seen: tuple[int, ...], bias: float
) -> npt.NDArray[Any]:
    full = F.interpolate(logits.float(), size=truth.shape, mode="bilinear")
    scores = full.softmax(dim=1) if row.softmax else full.sigmoid()
    found = lower_seen(scores, seen if bias else (), bias)[0].argmax(dim=0)
    return found.numpy().astype(truth.dtype)


def _over_draws(figures: list[dict[str, float]]) -> dict[str, float]:
    """Means over draws of other unseen names; spread and least of unseen mIoU."""
    names = ("pAcc", "mIoU(S)", "mIoU(U)")
    unseen = [found["mIoU(U)"] for found in figures]
    means = {f"others {name}": float(np.mean([f[name] for f in figures])) for name in names}
    spread = float(np.std(unseen, ddof=1)) if len(unseen) > 1 else 0.0
    return means | {"others sd of mIoU(U)": spread, "others least mIoU(U)": min(unseen)}
