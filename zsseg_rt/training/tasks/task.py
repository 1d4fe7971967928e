"""What the training loop trains: a model, its loss, and what data it may use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from zsseg_rt.training.data.batch import Batch


class TrainingTask(nn.Module, ABC):
    """A model and its objective; the loop knows nothing else about either.

    ``forward`` is what is wrapped for several processes, so everything with gradients happens in
    it. ``model`` is what a checkpoint stores and what evaluation and export use.

    Args:
        model: The model to train.

    Attributes:
        needs_labels: Whether it learns from class labels.
        tunes_text: Whether it trains the model's text tower, so that embeddings of class names
            change.
    """

    needs_labels: ClassVar[bool] = True
    tunes_text: bool = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the weighted loss terms of a batch; their sum is minimised.

        Returns:
            Scalars by name, all finite unless training has diverged.
        """

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, object]]:
        """Groups for the optimizer: trainable ``params`` with ``lr`` and ``weight_decay``."""

    def left_out(self) -> Mapping[str, nn.Module]:
        """Frozen parts, by their names in the task, whose weights no checkpoint stores.

        The code that builds the task reads them from their own files. A run is resumed only with
        the same weights: a checkpoint records their hash.
        """
        return {}


def parameter_group(
    tensors: Sequence[Tensor], learning_rate: float, weight_decay: float
) -> list[dict[str, object]]:
    """A list with one AdamW group of the parameters; empty if there are none."""
    if not tensors:
        return []
    return [{"params": list(tensors), "lr": learning_rate, "weight_decay": weight_decay}]
