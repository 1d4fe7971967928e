"""How far figures on nine unseen names hold for nine others, drawn at random.

``tools/make_demo.py --evaluate-draws N`` is the command. Each draw has scenes of its own, which are
made of the seen names and the nine others; the nine published names are measured on scenes of the
same seed beside them.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tools.scenes import CLASS_NAMES, SEEN, SceneDataset, world_of_split
from tools.scenes.words import (
    GROUNDS,
    NEVER_CAPTIONED,
    SHAPES,
    all_stuff,
    all_things,
    kind_of,
)
from zsseg_rt.common.files import sha256_of
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.evaluate import EngineSegmenter, Evaluation, Segmenter, evaluate
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine

_log = logging.getLogger(__name__)

__all__ = ["DrawnScenes", "evaluate_draws", "measure_bundle", "summarise"]
__all__ += ["unseen_figures"]

KINDS = ("others", "published")
"""Names of a draw, and the published ones on scenes of the same seed."""

Opened = Callable[[tuple[str, ...]], Segmenter]
"""Makes something that labels images with the given names."""


def other_unseen(draw: int) -> tuple[str, ...]:
    """:data:`CLASS_NAMES` with nine other unseen names of the same make-up.

    The nine are drawn at random: things of five distinct shapes, a wall, a sky, a floor and a
    stretch of grass, sand or water. Their words are words of seen names; none is a class of the
    world or one of :data:`NEVER_CAPTIONED`.
    """
    if draw < 0:
        raise ArgumentError(f"draw: expected at least 0, got {draw}. Choose another.")
    trained_words = {word for index in SEEN for word in CLASS_NAMES[index].split()}
    taken = {*CLASS_NAMES, *NEVER_CAPTIONED}
    rng = np.random.default_rng([1, draw])
    names = list(CLASS_NAMES)
    shapes = [SHAPES[index] for index in rng.permutation(len(SHAPES))[:5]]
    things = [[kind for kind in all_things() if kind.noun == shape] for shape in shapes]
    grounds = tuple(noun for noun in GROUNDS if noun != "floor")
    stuff = [list(all_stuff(nouns)) for nouns in (("wall",), ("sky",), ("floor",), grounds)]
    places = [index for index in range(len(names)) if index not in SEEN]
    for place, kinds in zip(places, [*things, *stuff], strict=True):
        free = [
            k.name for k in kinds if set(k.name.split()) <= trained_words and k.name not in taken
        ]
        names[place] = free[rng.integers(len(free))]
    return tuple(names)


class DrawnScenes(SceneDataset):
    """Scenes of the ``val`` split made of the seen names and of nine other unseen ones.

    Args:
        draw: Which nine, and which scenes; none is among the published ones.
        length: Number of images.
        published: Whether to keep the nine published names; the scenes' seed is the draw's.

    Raises:
        ArgumentError: ``draw`` is negative, or ``length`` below 1.
    """

    def __init__(self, draw: int, *, length: int = 300, published: bool = False) -> None:
        names, seed = other_unseen(draw), draw + 1
        super().__init__("val", length=length, seed=seed)
        if not published:
            self.class_names, self.name = names, f"scenes/val/draw-{draw}"
            self.world = world_of_split("val", seed, class_names=names, common=names)


def evaluate_draws(
    opened: Opened, draws: Iterable[int], *, length: int = 300
) -> list[dict[str, Any]]:
    """Measure draws of names, each beside the published names on scenes of the same seed.

    Args:
        opened: The model.
        draws: Numbers of the draws.
        length: Scenes for each.

    Returns:
        For every draw its number, the nine names, and the figures of ``others`` and
        ``published``, in percent.
    """
    rows = []
    for draw in draws:
        row: dict[str, Any] = {"draw": draw}
        for kind in KINDS:
            data = DrawnScenes(draw, length=length, published=kind == "published")
            result = evaluate(opened(data.class_names), data)
            row[kind] = unseen_figures(result)
            if kind == "others":
                seen = set(SEEN)
                row["unseen"] = [n for i, n in enumerate(data.class_names) if i not in seen]
                row["iou_percent"] = {r["name"]: r["iou_percent"] for r in result.class_table()}
        rows.append(row)
        _log.info("draw %d: %s", draw, {kind: row[kind]["mIoU(U)"] for kind in KINDS})
    return rows


def unseen_figures(result: Evaluation) -> dict[str, float]:
    """Figures in percent; unseen classes also by things, stuff, and pixels named right.

    Raises:
        ArgumentError: Too few scenes: they show no unseen thing, or no unseen stretch.
    """
    trained = {CLASS_NAMES[index] for index in SEEN}
    shares = result.scores.iou
    unseen = [i for i in range(len(result.class_names)) if i not in set(result.seen)]
    things = [i for i in unseen if kind_of(result.class_names[i]).is_thing]
    stuff = [i for i in unseen if i not in things]
    taught = [i for i, name in enumerate(result.class_names) if name in trained]
    for group in (things, stuff, taught):
        if np.isnan(shares[group]).all():
            raise ArgumentError(
                f"length: expected scenes that show things and stuff, seen and unseen, got "
                f"{result.pictures} that do not. Use more scenes."
            )
    right = sum(int(result.counts[i, i]) for i in unseen)
    figures = result.scores.as_reported() | {
        "mIoU(U) things": 100 * float(np.nanmean(shares[things])),
        "mIoU(U) stuff": 100 * float(np.nanmean(shares[stuff])),
        "unseen pixels right": 100 * right / max(int(result.counts[unseen].sum()), 1),
        "mIoU(trained)": 100 * float(np.nanmean(shares[taught])),
    }
    return {name: round(value, 2) for name, value in figures.items()}


def summarise(rows: Iterable[Mapping[str, Any]], kind: str) -> dict[str, dict[str, float]]:
    """Mean, sample standard deviation, least and most over draws, figure by figure."""
    columns = [row[kind] for row in rows]
    return {
        name: {
            "mean": round(statistics.fmean(column[name] for column in columns), 2),
            "sd": round(_spread([column[name] for column in columns]), 2),
            "least": min(column[name] for column in columns),
            "most": max(column[name] for column in columns),
        }
        for name in columns[0]
    }


def measure_bundle(
    bundle: Path,
    *,
    draws: Iterable[int] = (),
    length: int = 300,
    root: Path,
) -> dict[str, Any]:
    """Measure a bundle of the synthetic world at float32; returns the record, as plain data.

    Args:
        bundle: The bundle.
        draws: Numbers of draws of names; see :func:`evaluate_draws`.
        length: Scenes for each.
        root: The checkout whose commit is written down.
    """
    with Engine(bundle, EngineConfig(device="cpu", precision="float32")) as engine:

        def opened(names: tuple[str, ...]) -> Segmenter:
            return EngineSegmenter(engine, names)

        by_draw = evaluate_draws(opened, draws, length=length)
        about: dict[str, Any] = {"commit": describe_commit(root), "machine": describe_machine()}
        about |= {"bundle_sha256": sha256_of(bundle / "bundle.json"), "precision": "float32"}
        about |= {"scenes": length}
    summary = {kind: summarise(by_draw, kind) for kind in KINDS} if by_draw else {}
    return about | {"summary": summary, "draws": by_draw}


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
