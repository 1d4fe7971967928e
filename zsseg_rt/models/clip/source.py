"""Which CLIP a model starts from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.torch_files.clip_weights import Activation, ClipWeights, load_clip


@dataclass(frozen=True, kw_only=True)
class ClipSource(ABC):
    """CLIP weights by tag or file; what builds a model from them has its settings beside these.

    Attributes:
        pretrained: A file or an open_clip tag; see :func:`zsseg_rt.models.load_clip`.
        clip: open_clip's name of the model, for a tag.
        activation: For a ``state_dict`` file, which does not store it.
        num_heads: Heads of the image tower, for a file; None is one per 64 channels.
        text_heads: Heads of the text tower, for a file; None is one per 64 channels.
        trust: See :func:`zsseg_rt.torch_files.checkpoints.load_checkpoint`.
    """

    pretrained: str | Path | None
    clip: str = "ViT-B-16"
    activation: Activation | None = None
    num_heads: int | None = None
    text_heads: int | None = None
    trust: bool = False

    @abstractmethod
    def build(self) -> SegmentationModel:
        """Make the model, in evaluation mode."""

    def load(self) -> ClipWeights:
        """Read the weights.

        Raises:
            ArgumentError: There is no source.
            CheckpointError: They cannot be read or are not a CLIP ViT's.
        """
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
            trust=self.trust,
        )
