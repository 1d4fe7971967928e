"""Checks of a run's data: of all of it before, and of the first batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets import SegmentationDataset
from zsseg_rt.evaluation.datasets.base import Verification, verify_dataset
from zsseg_rt.training.config import DataUse, TrainConfig

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
    dataset: str  # Its name
    class_names: tuple[str, ...]  # One phrase per class
    seen: tuple[int, ...]  # Indices of the seen classes
    scan: Verification  # The scan of all images
    # Names of the classes that training learns from masks but no mask holds
    lacking: tuple[str, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """Faults to fix before training, counted."""
        faults = []
        if self.scan.problems:
            faults.append(f"unusable images in {self.dataset}: {len(self.scan.problems)}")
        if self.lacking:
            names = ", ".join(self.lacking[:5]) + (" and more" if len(self.lacking) > 5 else "")
            faults.append(f"no pixel in {self.dataset} of {names}")
        return tuple(faults)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        scan = self.scan
        return {
            "use": self.use,
            "dataset": self.dataset,
            "pictures": scan.num_pictures,
            "pixels": dict(zip(self.class_names, scan.pixels.tolist(), strict=True)),
            "ignored_pixels": scan.ignored_pixels,
            "absent": list(scan.absent),
            "lacking": list(self.lacking),
            "problems": list(scan.problems),
        }


def check_data(
    config: TrainConfig, progress: Callable[[int, int], None] | None = None
) -> tuple[SplitCheck, ...]:
    """Read every image and mask that a run trains on or is evaluated on."""
    judged = bool(config.evaluation.split)
    uses: tuple[DataUse, ...] = ("training", "evaluation") if judged else ("training",)
    opened = [(use, config.open_data(use)) for use in uses]
    checks = []
    for use, dataset in opened:
        scan = verify_dataset(dataset, progress)
        learns = use == "training" and config.model.architecture != "zeroseg"
        names = dataset.class_names
        learned = range(len(names)) if config.task.protocol == "supervised" else dataset.seen
        checks.append(
            SplitCheck(
                use=use,
                dataset=dataset.name,
                class_names=tuple(names),
                seen=tuple(dataset.seen),
                scan=scan,
                lacking=tuple(names[row] for row in learned if learns and not scan.pixels[row]),
            )
        )
    return tuple(checks)


def require_labels(
    batches: BatchSource, protocol: LabelProtocol, dataset: SegmentationDataset
) -> BatchSource:
    """Pass batches on, unless the first ones hold no label that training may use.

    Checking stops once a batch has some. Without any, the run ends after :data:`LEAST_BATCHES`
    batches, or after more if those are less than three epochs and less than
    1000 images.
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
                raise _nothing_to_learn(dataset, protocol, limit)
            yield batch
            if useful:
                break
        yield from stream

    return source


def _nothing_to_learn(
    dataset: SegmentationDataset, protocol: LabelProtocol, batches: int
) -> DatasetError:
    kind = "seen " if protocol.protocol == "inductive" else ""
    return DatasetError(
        f"{dataset.name}: expected annotated pixels of {kind}classes, got none in the first "
        f"{batches} batches. Check the masks with zsseg-rt train --config FILE --check-data: "
        "their values must be those of the classes, and classes that are held out as unseen "
        "are not trained on."
    )
