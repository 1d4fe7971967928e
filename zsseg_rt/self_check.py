"""Compare a running engine with the golden sample its bundle carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundle import Bundle, HeadSpec
from zsseg_rt.errors import BundleError
from zsseg_rt.ops.reference import activate, upsample_bilinear
from zsseg_rt.pipelines.base import seen_phrases

__all__ = ["SelfCheck", "StageCheck", "check_against_golden"]

STAGES = (
    "image",
    "patch_embeds",
    "cls_embed",
    "queries",
    "class_embeds",
    "patch_keys",
    "region_masks",
    "segment_embeds",
    "image_embed",
    "no_object",
    "class_scores",
    "mask_logits",
)

# Largest accepted |engine - golden| relative to the stage's largest value. float32: a dozen
# transformer blocks summed in another order; the half precisions: 8 and 11 significant bits
# through the same blocks.
TOLERANCES = {"float32": 1e-3, "bfloat16": 8e-2, "float16": 3e-2}

# Stages that follow from a threshold: a mask's pixel that flips changes what CLIP is shown.
_SLACK = {"class_scores": 10.0}

# Families whose golden logits are from before the activation and the seen bias.
_RAW_LOGITS = ("descriptor", "dense")

# Smallest share of equal labels among pixels whose top-two margin exceeds the tolerance.
AGREEMENTS = {"float32": 0.999, "bfloat16": 0.995, "float16": 0.995}

# (frame, class names, embeddings, the rule that the golden labels follow) -> stages and labels
RunGolden = Callable[
    [npt.NDArray[np.uint8], Sequence[str], npt.NDArray[np.float32], HeadSpec],
    dict[str, npt.NDArray[Any]],
]


@dataclass(frozen=True, kw_only=True)
class StageCheck:
    """One stage's verdict.

    Attributes:
        stage: Name in the golden sample.
        error: Largest absolute difference over the largest golden value; for ``labels`` the
            share of pixels with a clear winner that differ.
        tolerance: Largest accepted error.
    """

    stage: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Verdicts of all stages, in the order data flows."""

    precision: str
    stages: tuple[StageCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every stage passed."""
        return all(stage.passed for stage in self.stages)

    @property
    def first_failure(self) -> StageCheck | None:
        """The stage where the engine first left the golden sample, or None."""
        return next((stage for stage in self.stages if not stage.passed), None)


def check_against_golden(bundle: Bundle, precision: str, run: RunGolden) -> SelfCheck:
    """Run the golden frame and compare every intermediate.

    Raises:
        BundleError: The bundle has no golden sample, or it lacks an array.
    """
    golden = _read_golden(bundle)
    names = [str(name) for name in golden["class_names"]]
    embeds = golden["text_embeds"]
    if "region_text_embeds" in golden:
        embeds = np.stack([embeds, golden["region_text_embeds"]])
    # Most samples were labelled without a threshold; those that were not show it.
    unknown = np.iinfo(golden["labels"].dtype).max
    threshold = bundle.head.unknown_below if (golden["labels"] == unknown).any() else None
    found = run(golden["frame"], names, embeds, replace(bundle.head, unknown_below=threshold))
    tolerance = TOLERANCES.get(precision, TOLERANCES["float16"])
    stages = [
        StageCheck(
            stage=stage,
            error=_scaled_error(found[stage], golden[stage]),
            tolerance=tolerance * _SLACK.get(stage, 1.0),
        )
        for stage in STAGES
        if stage in golden and stage in found
    ]
    agreement = AGREEMENTS.get(precision, AGREEMENTS["float16"])
    stages.append(
        StageCheck(
            stage="labels",
            error=_label_error(bundle, golden, found["labels"], tolerance),
            tolerance=1.0 - agreement,
        )
    )
    return SelfCheck(precision=precision, stages=tuple(stages))


def _read_golden(bundle: Bundle) -> dict[str, npt.NDArray[Any]]:
    if bundle.golden is None:
        raise BundleError(
            f"{bundle.path / 'bundle.json'}: missing key 'golden'. Export the bundle again."
        )
    path = bundle.open_path(bundle.golden)
    try:
        with np.load(path, allow_pickle=False) as archive:
            golden = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path}: expected a golden sample, got {exc}") from exc
    for name in ("frame", "class_names", "text_embeds", "mask_logits", "labels"):
        if name not in golden:
            raise BundleError(f"{path}: missing array {name!r}. Export the bundle again.")
    return golden


def _scaled_error(found: npt.NDArray[Any], golden: npt.NDArray[Any]) -> float:
    if found.shape != golden.shape:
        return float("inf")
    scale = max(float(np.abs(golden).max(initial=0.0)), 1e-6)
    error = float(np.abs(found.astype(np.float64) - golden).max(initial=0.0)) / scale
    return error if np.isfinite(error) else float("inf")


def _label_error(
    bundle: Bundle,
    golden: dict[str, npt.NDArray[Any]],
    labels: npt.NDArray[Any],
    tolerance: float,
) -> float:
    """Share of pixels that differ among those whose winner is clear."""
    if golden["mask_logits"].shape[1] == 1:
        return float((labels != golden["labels"]).mean())
    clear = _clear_winner(bundle, golden, labels.shape, tolerance)
    if not clear.any():
        return 0.0
    return float((labels[clear] != golden["labels"][clear]).mean())


def _clear_winner(
    bundle: Bundle,
    golden: dict[str, npt.NDArray[Any]],
    out_hw: tuple[int, ...],
    tolerance: float,
) -> npt.NDArray[np.bool_]:
    """Where the winner stays the winner whichever way every logit moves by the tolerance."""
    logits = golden["mask_logits"].astype(np.float32)
    slack = tolerance * float(np.abs(logits).max())
    maps = upsample_bilinear(logits, (out_hw[0], out_hw[1]))[0]
    bias = _seen_bias(bundle, golden)
    if not bias.any():
        ranked = np.sort(maps, axis=0)
        return np.asarray(ranked[-1] - ranked[-2] > 2.0 * slack)
    activation = bundle.head.activation
    if activation == "softmax":  # is the sigmoid of its log-odds, which move twice as far
        maps, slack, activation = _log_odds(maps), 2.0 * slack, "sigmoid"
    winner = (activate(maps, activation) - bias).argmax(axis=0)[None]
    worst = np.take_along_axis(maps, winner, axis=0) - np.float32(slack)
    worst = (activate(worst, activation) - bias.ravel()[winner])[0]
    rivals = activate(maps + np.float32(slack), activation) - bias
    np.put_along_axis(rivals, winner, -np.inf, axis=0)
    return np.asarray(worst > rivals.max(axis=0))


def _seen_bias(bundle: Bundle, golden: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """What seen classes lose after the activation [C, 1, 1]; 0 where the maps hold it already."""
    count = golden["mask_logits"].shape[1]
    seen = seen_phrases([str(name) for name in golden["class_names"]], bundle.head)
    if bundle.family not in _RAW_LOGITS or seen is None:
        return np.zeros((count, 1, 1), np.float32)
    return (bundle.head.seen_bias * seen).astype(np.float32).reshape(count, 1, 1)


def _log_odds(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logarithm of p / (1 - p) of the softmax p over axis 0."""
    shares = np.exp(maps.astype(np.float64) - maps.max(axis=0))
    shares /= shares.sum(axis=0)
    shares = shares.clip(1e-30, 1.0 - 1e-15)
    return np.asarray(np.log(shares) - np.log1p(-shares), np.float32)
