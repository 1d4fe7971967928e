"""Measure a candidate: how often it labels as float32 does, where float32's label is clear."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import GraphEntry
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.export.graph_files import describe_graph
from zsseg_rt.photos.files import read_photo
from zsseg_rt.text.vocabulary import Vocabulary

CLEAR = 0.1
"""A label is clear where the winner's score is ahead of the second by this share of itself."""

Advance = Callable[[str, int, int], None]
"""Called with what is done, how often it was done, and how often it will be."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What float32 makes of pictures.

    Attributes:
        photos: The pictures.
        vocabulary: The classes.
        labels: Per picture, the best class of each cell, [gh, gw].
        clear: Per picture, where it is clear, bool [gh, gw].
    """

    photos: tuple[Path, ...]
    vocabulary: Vocabulary
    labels: tuple[npt.NDArray[np.intp], ...]
    clear: tuple[npt.NDArray[np.bool_], ...]

    def first(self, count: int) -> Reference:
        """The same for the first pictures."""
        return replace(
            self,
            photos=self.photos[:count],
            labels=self.labels[:count],
            clear=self.clear[:count],
        )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Shares of cells with float32's label: where it is clear, and everywhere."""

    clear: float
    everywhere: float


def engine_config(precision: str, *, num_lanes: int = 1) -> EngineConfig:
    """The engine that measures: on the CPU, without a cache, with every class's scores."""
    return EngineConfig(
        device="cpu", backend="openvino", precision=precision, use_cache=False,
        with_class_scores="low", num_lanes=num_lanes,
    )  # fmt: skip


def take_reference(engine: Engine, photos: Sequence[Path], advance: Advance) -> Reference:
    """Label pictures with a float32 engine whose classes are named."""
    assert engine.vocabulary is not None
    labels, clear = [], []
    for place, photo in enumerate(photos):
        scores = _scores(engine, photo)
        ranked = np.sort(scores, axis=0)
        second = ranked[-2] if len(ranked) > 1 else np.full_like(ranked[-1], -np.inf)
        labels.append(scores.argmax(axis=0))
        clear.append(ranked[-1] - second > CLEAR * np.abs(ranked[-1]))
        advance("float32", place + 1, len(photos))
    return Reference(
        photos=tuple(photos),
        vocabulary=engine.vocabulary,
        labels=tuple(labels),
        clear=tuple(clear),
    )


def measure(bundle: Bundle, precision: str, reference: Reference) -> Agreement:
    """Run a candidate on the reference's pictures."""
    same, counted, same_anywhere, cells = 0, 0, 0, 0
    with Engine(bundle, engine_config(precision)) as engine:
        engine.set_classes(reference.vocabulary)
        for photo, labels, clear in zip(
            reference.photos, reference.labels, reference.clear, strict=True
        ):
            equal = _scores(engine, photo).argmax(axis=0) == labels
            same += int(equal[clear].sum())
            counted += int(clear.sum())
            same_anywhere += int(equal.sum())
            cells += equal.size
    return Agreement(clear=same / counted if counted else 1.0, everywhere=same_anywhere / cells)


def candidate(
    bundle: Bundle, folder: Path, graphs: Mapping[str, onnx.ModelProto], precision: str
) -> Bundle:
    """A bundle with these graphs in place of its own, in an empty folder; nothing is hashed yet.

    INT8 graphs are run as they are. For FP8 they are float32 graphs that round as FP8 does.
    """
    folder.mkdir()
    for entry in bundle.files():
        if not isinstance(entry, GraphEntry):
            link_or_copy(bundle.open_path(entry), folder / entry.file)
    entered = "int8" if precision == "int8" else "float32"
    made = {name: {entered: write_graph(m, name, folder, precision)} for name, m in graphs.items()}
    return replace(bundle, path=folder, graphs=made, golden=None)


def write_graph(model: onnx.ModelProto, name: str, folder: Path, precision: str) -> GraphEntry:
    """Write ``NAME.PRECISION.onnx`` and describe it."""
    path = folder / f"{name}.{precision}.onnx"
    onnx.save(model, path)
    return describe_graph(path, folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file into another folder; without a copy where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _scores(engine: Engine, photo: Path) -> npt.NDArray[np.float32]:
    scores = engine.segment(read_photo(photo)).class_scores
    assert scores is not None
    return scores
