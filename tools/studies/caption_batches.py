"""Batches of captioned images from the synthetic world; a batch depends only on its step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tools.scenes import world_of_split
from tools.scenes.captions import describe_scene
from tools.scenes.words import NEVER_CAPTIONED
from tools.scenes.world import visible
from tools.studies.crops import Captioned, captioned_views
from zsseg_rt.export.words import tokenizer_json
from zsseg_rt.text.tokenizer import Tokenizer

_SCENES_PER_STEP = 1024  # room in the numbering: no two steps share a scene


@dataclass(frozen=True)
class CaptionBatch:
    """Images of one size and their captions.

    Attributes:
        images: RGB, uint8 ``[B, 3, H, W]``.
        tokens: Token ids of the distinct captions, int64 ``[U, L]``.
        caption_of: Index of each image's caption, int64 ``[B]``.
        names: What the batch is called in messages.
    """

    images: Tensor
    tokens: Tensor
    caption_of: Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device) -> CaptionBatch:
        """The batch on another device."""
        return CaptionBatch(
            images=self.images.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            caption_of=self.caption_of.to(device, non_blocking=True),
            names=self.names,
        )


class CaptionBatches(Dataset[CaptionBatch]):
    """Batches by step: mostly closer views, every ``whole_every``-th of whole scenes.

    Args:
        steps: Number of batches.
        seed: The world's seed.
        batch_size: Views per batch; half as many whole scenes.
        view_size: Side of views in pixels.
        size: Side of whole scenes in pixels.
        whole_every: One batch in this many holds whole scenes.
        context_length: Tokens per caption.
    """

    def __init__(
        self,
        *,
        steps: int,
        seed: int = 0,
        batch_size: int = 256,
        view_size: int = 64,
        size: int = 128,
        whole_every: int = 4,
        context_length: int = 24,
    ) -> None:
        self.steps, self.batch_size = steps, batch_size
        self.view_size, self.whole_every = view_size, whole_every
        self._world = world_of_split("pretraining", seed, size=size, class_share=0.0)
        self._seed = seed
        self._tokenizer = Tokenizer(tokenizer_json(), context_length=context_length)
        self._never = tuple(NEVER_CAPTIONED)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> CaptionBatch:
        """Draw the batch of a step."""
        rng = np.random.default_rng([self._seed, 4, step])
        whole = step % self.whole_every == self.whole_every - 1
        count = self.batch_size // 2 if whole else self.batch_size
        pairs: list[Captioned] = []
        for offset in range(_SCENES_PER_STEP):
            drawn = self._pairs(_SCENES_PER_STEP * step + offset, whole, rng)
            pairs += [pair for pair in drawn if not any(name in pair[1] for name in self._never)]
            if len(pairs) >= count:
                break
        return self._collate(pairs[:count], f"captions/step-{step}")

    def _pairs(self, index: int, whole: bool, rng: np.random.Generator) -> list[Captioned]:
        scene = self._world.scene(index, num_captions=0)
        if whole:
            seen = visible(scene.identities, scene.kinds, 200)
            return [(scene.image, describe_scene(seen, rng))]
        return list(captioned_views(scene, self.view_size, rng))

    def _collate(self, pairs: list[Captioned], name: str) -> CaptionBatch:
        images = np.stack([image for image, _ in pairs]).transpose(0, 3, 1, 2)
        captions = list(dict.fromkeys(caption for _, caption in pairs))
        number = {caption: index for index, caption in enumerate(captions)}
        return CaptionBatch(
            images=torch.from_numpy(np.ascontiguousarray(images)),
            tokens=torch.from_numpy(self._tokenizer.encode(captions)),
            caption_of=torch.tensor([number[caption] for _, caption in pairs]),
            names=(name,),
        )
