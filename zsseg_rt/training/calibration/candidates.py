"""Judge many settings of the cosine rule and of the seen bias on the same images.

What a class scores depends on its own weight and on the scale alone. So each image is blended once
for each weight and scale; the best seen and the best unseen class of every pixel then decide, for
every pair of weights and every bias, what the engine would label. Nothing but counts is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.cosine_rule import CosineRule
from zsseg_rt.models.base import ScoreActivation
from zsseg_rt.ops.reference import activate, blend_cosines

_LATTICE = 48  # rows and columns of pixels that are judged, at most
_SEEN_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_UNSEEN_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_SCALES = (5.0, 10.0, 20.0, 50.0, 100.0)
_BIASES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)

Counts = npt.NDArray[np.int64]
Maps = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Setting:
    """One way to label.

    Attributes:
        cosine: How much cosines count; None: not at all.
        seen_bias: What seen probabilities are lowered by.
    """

    cosine: CosineRule | None
    seen_bias: float


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The settings that are tried: all combinations, and every bias without cosines.

    Attributes:
        seen_weights: Of cosines, for seen classes.
        unseen_weights: For all others.
        scales: Factors of the cosines.
        biases: What seen probabilities are lowered by, ascending.
    """

    seen_weights: tuple[float, ...] = _SEEN_WEIGHTS
    unseen_weights: tuple[float, ...] = _UNSEEN_WEIGHTS
    scales: tuple[float, ...] = _SCALES
    biases: tuple[float, ...] = _BIASES

    def with_bias(self, bias: float) -> Grid:
        """The same with one more bias, unless it is among them."""
        return replace(self, biases=tuple(sorted({*self.biases, bias})))

    def rules(self) -> list[CosineRule | None]:
        """All rules: first none, then small weights before large ones."""
        pairs = [(s, u) for s in self.seen_weights for u in self.unseen_weights if s or u]
        return [
            None,
            *(
                CosineRule(seen_weight=seen, unseen_weight=unseen, scale=scale)
                for seen, unseen in pairs
                for scale in self.scales
            ),
        ]

    def settings(self) -> list[Setting]:
        """Every setting, rule by rule."""
        return [Setting(rule, bias) for rule in self.rules() for bias in self.biases]


@dataclass(frozen=True, kw_only=True)
class ImageMaps:
    """What a model says about one image, at the patch grid, and the truth.

    Attributes:
        mask_logits: float32 ``[P, gh, gw]``.
        cosines: Of patches and phrases, unscaled, float32 ``[P, gh, gw]``.
        labels: Indices of the judged classes, ``[H, W]``; the ignore label elsewhere.
    """

    mask_logits: Maps
    cosines: Maps
    labels: npt.NDArray[Any]


@dataclass
class CandidateCounts:
    """Counts of all settings over all images so far.

    Attributes:
        grid: The settings.
        classes: Which class each phrase stands for, int64 ``[P]``.
        shares: How much of its class each phrase is, ``[P]``.
        seen: Whether a class counts as seen, bool ``[C]``.
        activation: What turns mask logits into probabilities.
        own_bias: The model's own seen bias, which is tried too.
        settings: All settings, in the order of the counts.
        correct: Pixels labelled right, int64 ``[settings, C]``.
        predicted: Pixels labelled so, of those with a label, int64 ``[settings, C]``.
        true: Pixels of each class, int64 ``[C]``.
    """

    grid: Grid
    classes: npt.NDArray[np.int64]
    shares: Sequence[float]
    seen: npt.NDArray[np.bool_]
    activation: ScoreActivation
    own_bias: float
    settings: tuple[Setting, ...] = field(init=False)
    correct: Counts = field(init=False)
    predicted: Counts = field(init=False)
    true: Counts = field(init=False)

    def __post_init__(self) -> None:
        self.grid = self.grid.with_bias(self.own_bias)
        self.settings = tuple(self.grid.settings())
        size = (len(self.settings), len(self.seen))
        self.correct, self.predicted = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.true = np.zeros(len(self.seen), np.int64)
        seen = self.seen[self.classes]
        self._rows = {True: np.flatnonzero(seen), False: np.flatnonzero(~seen)}

    def add(self, maps: ImageMaps) -> None:
        """Judge every setting on an image."""
        pixels = _Pixels.of(maps, len(self.seen))
        if not len(pixels.truth):
            return
        self.true += np.bincount(pixels.truth, minlength=len(self.seen))
        scales = self.grid.scales
        blended = {
            (seen, weight, scale): self._best(maps, pixels, seen=seen, weight=weight, scale=scale)
            for seen in (True, False)
            for weight in (self.grid.seen_weights if seen else self.grid.unseen_weights)
            for scale in scales
        }
        step = len(self.grid.biases)
        for place, rule in enumerate(self.grid.rules()):
            if rule is None:
                best = self._best_without(maps, pixels)
            else:
                best = (
                    blended[True, rule.seen_weight, rule.scale],
                    blended[False, rule.unseen_weight, rule.scale],
                )
            self._count(slice(place * step, (place + 1) * step), pixels.truth, *best)

    @property
    def own(self) -> int:
        """The place of the model's own setting: no cosines, its own bias."""
        return self.settings.index(Setting(None, self.own_bias))

    def harmonic_means(self) -> npt.NDArray[np.float64]:
        """Every setting's hIoU in percent, float64 ``[settings]``; NaN where nothing counted."""
        seen, unseen = self.group_means(seen=True), self.group_means(seen=False)
        total = seen + unseen
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 0, 2 * seen * unseen / total, total)

    def group_means(self, *, seen: bool) -> npt.NDArray[np.float64]:
        """The mIoU of the seen or of the other classes in percent, float64 ``[settings]``."""
        union = self.true + self.predicted - self.correct
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = np.where(union > 0, self.correct / union, np.nan)
        chosen = iou[:, self.seen == seen]
        counted = (~np.isnan(chosen)).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return 100.0 * np.where(counted > 0, np.nansum(chosen, axis=1) / counted, np.nan)

    def _best(
        self, maps: ImageMaps, pixels: _Pixels, *, seen: bool, weight: float, scale: float
    ) -> _Best:
        """The best class of a group at every pixel, for one weight of its cosines."""
        logs = blend_cosines(
            maps.mask_logits[None],
            np.float32(scale) * maps.cosines[None],
            np.full(len(self.classes), weight, np.float32),
            np.asarray(self.shares, np.float32),
            activation=self.activation,
        )[0]
        values = pixels.upsample(logs[self._rows[seen]])
        best = self._best_of(values, seen=seen)  # a sigmoid keeps the order
        return _Best(activate(best.scores, "sigmoid"), best.classes)

    def _best_without(self, maps: ImageMaps, pixels: _Pixels) -> tuple[_Best, _Best]:
        scores = activate(pixels.upsample(maps.mask_logits), self.activation)
        parts = [self._best_of(scores[self._rows[s]], seen=s) for s in (True, False)]
        return parts[0], parts[1]

    def _best_of(self, scores: Maps, *, seen: bool) -> _Best:
        rows = scores.argmax(axis=0)
        best = np.take_along_axis(scores, rows[None], axis=0)[0]
        return _Best(best, self.classes[self._rows[seen][rows]])

    def _count(
        self, place: slice, truth: npt.NDArray[np.int64], seen: _Best, unseen: _Best
    ) -> None:
        """Count one rule with every bias: each pixel leaves its seen class at some bias."""
        biases = np.asarray(self.grid.biases)
        margins = seen.scores.astype(np.float64) - unseen.scores
        kept = np.searchsorted(biases, margins, side="left")
        for best, stays in ((seen, True), (unseen, False)):
            for counts, where in (
                (self.predicted, slice(None)),
                (self.correct, best.classes == truth),
            ):
                found = best.classes[where] * (len(biases) + 1) + kept[where]
                table = np.bincount(found, minlength=len(self.seen) * (len(biases) + 1))
                below = table.reshape(len(self.seen), -1).cumsum(axis=1)
                parts = below[:, -1:] - below[:, :-1] if stays else below[:, :-1]
                counts[place] += parts.T


@dataclass(frozen=True)
class _Best:
    """The best class of a group at every judged pixel, and its score."""

    scores: Maps
    classes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Pixels:
    """Pixels of an image that are judged: those of a lattice that have a label."""

    truth: npt.NDArray[np.int64]
    labelled: npt.NDArray[np.bool_]
    rows: Maps
    columns: Maps

    @classmethod
    def of(cls, maps: ImageMaps, num_classes: int) -> _Pixels:
        height, width = maps.labels.shape
        grid_hw = maps.mask_logits.shape[1:]
        places = [_lattice(side) for side in (height, width)]
        truth = maps.labels[np.ix_(*places)].astype(np.int64).reshape(-1)
        labelled = truth < num_classes
        rows, columns = (
            _interpolation(place, side, cells)
            for place, side, cells in zip(places, (height, width), grid_hw, strict=True)
        )
        return cls(truth[labelled], labelled, rows, columns)

    def upsample(self, maps: Maps) -> Maps:
        """Maps ``[P, gh, gw]`` at the judged pixels, bilinear as the engine's, ``[P, pixels]``."""
        values = self.rows @ maps @ self.columns.T
        return np.ascontiguousarray(values.reshape(len(maps), -1)[:, self.labelled])


def _lattice(side: int) -> npt.NDArray[np.int64]:
    count = min(side, _LATTICE)
    return ((np.arange(count) + 0.5) * side / count).astype(np.int64)


def _interpolation(pixels: npt.NDArray[np.int64], side: int, cells: int) -> Maps:
    """Weights of cells at pixels, half-pixel centres, edges clamped, ``[pixels, cells]``."""
    place = np.clip((pixels + 0.5) * cells / side - 0.5, 0.0, cells - 1.0)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, cells - 1)
    weights = np.zeros((len(pixels), cells), np.float32)
    rows = np.arange(len(pixels))
    weights[rows, low] += (1.0 - (place - low)).astype(np.float32)
    weights[rows, high] += (place - low).astype(np.float32)
    return weights
