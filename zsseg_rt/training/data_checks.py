"""Checks of a run's data: of all of it before, and of the first batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets import SegmentationDataset
from zsseg_rt.evaluation.datasets.base import Verification, verify_dataset
from zsseg_rt.training.config import TrainConfig

if TYPE_CHECKING:
    from zsseg_rt.training.data import Batch
    from zsseg_rt.training.loop.loop import BatchSource
    from zsseg_rt.training.tasks.labelled import LabelProtocol

LEAST_BATCHES = 50
"""This many batches without anything to learn from are not an accident of random crops."""
_LEAST_EPOCHS = 3
_ENOUGH_IMAGES = 1000


@dataclass(frozen=True, kw_only=True)
class SplitCheck:
    """The check of one split of a run's data."""

    use: str  # "training" or "evaluation"
    dataset: SegmentationDataset
    scan: Verification  # The scan of all images
    lacking: tuple[str, ...]  # Classes that training learns from masks but no mask holds

    @property
    def faults(self) -> tuple[str, ...]:
        """Faults to fix before training, counted."""
        faults = []
        if self.scan.problems:
            faults.append(f"unusable images in {self.dataset.name}: {len(self.scan.problems)}")
        if self.lacking:
            names = ", ".join(self.lacking[:5]) + (" and more" if len(self.lacking) > 5 else "")
            faults.append(f"no pixel in {self.dataset.name} of {names}")
        return tuple(faults)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        scan, names = self.scan, self.dataset.class_names
        return {
            "use": self.use,
            "dataset": self.dataset.name,
            "pictures": scan.num_pictures,
            "pixels": dict(zip(names, scan.pixels.tolist(), strict=True)),
            "ignored_pixels": scan.ignored_pixels,
            "absent": list(scan.absent),
            "lacking": list(self.lacking),
            "problems": list(scan.problems),
        }


def check_data(
    config: TrainConfig, progress: Callable[[int, int], None] | None = None
) -> list[SplitCheck]:
    """Read every image and mask that a run trains on or is evaluated on."""
    opened = {"training": config.open_data("training")}
    if config.evaluation.split:
        opened["evaluation"] = config.open_data("evaluation")
    checks = []
    for use, dataset in opened.items():
        scan, names = verify_dataset(dataset, progress), dataset.class_names
        learned = range(len(names)) if config.task.protocol == "supervised" else dataset.seen
        if use == "evaluation" or config.model.architecture == "zeroseg":
            learned = ()
        lacking = tuple(names[row] for row in learned if not scan.pixels[row])
        checks.append(SplitCheck(use=use, dataset=dataset, scan=scan, lacking=lacking))
    return checks


def require_labels(
    batches: BatchSource, protocol: LabelProtocol, dataset: SegmentationDataset
) -> BatchSource:
    """Pass batches on, but end a run whose first ones hold no label that training may use.

    First are :data:`LEAST_BATCHES`, or more if those are less than three epochs and 1000 images.
    """
    table = protocol.table.cpu()

    def source(**position: Any) -> Iterator[Batch]:
        step_size = position["batch_size"] * position["num_processes"]
        enough = min(_LEAST_EPOCHS * len(dataset), _ENOUGH_IMAGES)
        limit = max(LEAST_BATCHES, -(-enough // step_size))
        stream = iter(batches(**position))
        for count, batch in enumerate(stream, start=1):
            useful = bool((table[batch.labels] != protocol.ignore_label).any())
            if count == limit and not useful:
                kind = "seen " if protocol.protocol == "inductive" else ""
                raise DatasetError(
                    f"{dataset.name}: expected annotated pixels of {kind}classes, got none in the "
                    f"first {limit} batches. Check the masks with zsseg-rt train --config FILE "
                    "--check-data: their values must be those of the classes, and classes that "
                    "are held out as unseen are not trained on."
                )
            yield batch
            if useful:
                break
        yield from stream

    return source
