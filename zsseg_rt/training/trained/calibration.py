"""The settings that ``zsseg-rt calibrate`` chose for a run: ``RUN/calibration.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zsseg_rt.common import schema
from zsseg_rt.common.cosine_rule import CosineRule
from zsseg_rt.errors import CheckpointError
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.results.visualize import save_file
from zsseg_rt.training.trained.card import TrainedClasses

CALIBRATION_FILE = "calibration.json"

HoldOutKind = Literal["names", "pictures"]


@dataclass(frozen=True, kw_only=True)
class FoldFigures:
    """How well a setting labelled the images of a hold-out, in percent.

    Attributes:
        seen: mIoU of the names that stayed annotated.
        unseen: mIoU of the names that were held out.
        harmonic_mean: hIoU of the two.
    """

    seen: float
    unseen: float
    harmonic_mean: float


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """One brief training.

    Attributes:
        names: The seen names that it was not shown.
        before: Figures with the run's own settings.
        after: Figures with the chosen ones.
    """

    names: tuple[str, ...]
    before: FoldFigures
    after: FoldFigures


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was chosen, and by what.

    Attributes:
        cosine: How much cosines count beside the masks; None: not at all.
        seen_bias: What seen probabilities are lowered by.
        seen: The run's seen names.
        iterations: Optimizer steps of each brief training.
        images: Training images that settings were chosen by.
        seed: Of the names that were held out.
        hold_outs: The brief trainings.
        hold_out: What they were not shown: labels of the held-out ``"names"``, or whole
            ``"pictures"`` that show one.
    """

    cosine: CosineRule | None
    seen_bias: float
    seen: tuple[str, ...]
    iterations: int
    images: int
    seed: int
    hold_outs: tuple[HoldOut, ...]
    hold_out: HoldOutKind = "names"

    @property
    def described(self) -> str:
        """The settings in the words of the command line."""
        rule = self.cosine
        weights = "0,0"
        if rule is not None:
            weights = f"{rule.seen_weight:g},{rule.unseen_weight:g},{rule.scale:g}"
        return f"--cosine {weights}, seen bias {self.seen_bias:g}"

    def mean(self, *, chosen: bool) -> float:
        """Mean hIoU over the hold-outs, in percent."""
        figures = [hold_out.after if chosen else hold_out.before for hold_out in self.hold_outs]
        return sum(found.harmonic_mean for found in figures) / len(figures)

    def apply(self, model: SegmentationModel) -> SegmentationModel:
        """The same weights with the chosen settings."""
        return model.with_cosine(self.cosine, seen_bias=self.seen_bias)

    def write(self, run: Path) -> Path:
        """Write it into a run's folder; the file has either the old content or the new."""
        path = run / CALIBRATION_FILE
        save_file(path, (json.dumps(schema.encode(self), indent=1) + "\n").encode())
        return path


def read_calibration(run: str | Path, classes: TrainedClasses | None = None) -> Calibration | None:
    """Read what was chosen for a run; None if nothing was."""
    path = _run_folder(Path(run)) / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        raw = schema.parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected what zsseg-rt calibrate wrote, got {error}. Calibrate again."
        ) from error
    found = schema.decode(Calibration, raw, str(path), CheckpointError)
    if classes is not None and found.seen != classes.seen_names:
        raise CheckpointError(
            f"{path}: expected settings chosen for this run's seen names, got those for others. "
            "Calibrate again, or remove the file."
        )
    return found


def _run_folder(path: Path) -> Path:
    """The run that a path refers to."""
    folder = path.resolve()
    inside = folder.parent.name == "checkpoints" and not (folder / "checkpoints").is_dir()
    return folder.parents[1] if inside else folder
