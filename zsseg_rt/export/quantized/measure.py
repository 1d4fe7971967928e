"""Measure a candidate: how often it labels as float32 does, and what it loses on masks."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import GraphEntry
from zsseg_rt.common.files import sha256_of
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError, DatasetError, SourceError
from zsseg_rt.evaluation.datasets.base import Sample, SegmentationDataset
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.export.graph_files import describe_graph
from zsseg_rt.onnx.network import Network
from zsseg_rt.onnx.writer import save_onnx
from zsseg_rt.photos import find_photos, read_photo
from zsseg_rt.text.vocabulary import Vocabulary

CLEAR = 0.1
"""A label is clear where the winner's score is ahead of the second by this share of itself."""

_log = logging.getLogger(__name__)

# --- images: some set ranges, others only measure ---

FEWEST, MOST = 8, 512
_MOST_MEASURED = 128
_MOST_NAMED = 5  # of pictures that cannot be read
_HELD_BACK = 4  # one picture in so many is measured on, and gives no ranges

Picture = Callable[[], Sample]
"""Reads a picture; without a data set its labels are empty."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images that give ranges, and others that are measured on; none is in both."""

    ranged: tuple[Picture, ...]  # Give ranges
    measured: tuple[Picture, ...]  # Are measured on
    hashes: tuple[str, ...]  # Their SHA-256, those of files, or of a data set's pixels
    # What the measured ones and their masks are from; None without masks
    dataset: SegmentationDataset | None


def choose_pictures(
    photos: Path | None,
    dataset: SegmentationDataset | None,
    seed: int,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Pictures:
    """Choose pictures, and read each once, so that none stops the work that follows.

    Ranges are from the photos and figures from the data set; of one of them alone, a quarter is
    held back to measure on.
    """
    rng = np.random.default_rng(seed)
    ranged: Sequence[Picture] = ()
    if photos is not None:
        files = find_photos([str(photos)])
        ranged = [partial(_read, files[place]) for place in rng.permutation(len(files))[:MOST]]
        _require(len(files), FEWEST, "photos", str(photos))
    measured: Sequence[Picture] = ()
    if dataset is not None:
        order = rng.permutation(len(dataset))[:MOST]
        measured = [partial(dataset.__getitem__, int(place)) for place in order]
        _require(len(dataset), 2 if ranged else FEWEST, "dataset", dataset.name)
    if ranged and measured:
        measured = measured[:_MOST_MEASURED]
    else:
        both = [*ranged, *measured]
        count = min(max(2, len(both) // _HELD_BACK), _MOST_MEASURED)
        ranged, measured = both[:-count], both[-count:]
    if not ranged:
        raise ArgumentError(
            "photos: expected a folder of pictures or a data set, got neither. Give one of them."
        )
    return Pictures(
        ranged=tuple(ranged),
        measured=tuple(measured),
        hashes=_checked([*ranged, *measured], len(ranged), advance),
        dataset=dataset,
    )


def _read(photo: Path) -> Sample:
    return Sample(image=read_photo(photo), labels=np.zeros((0, 0), np.uint8), name=str(photo))


def _checked(
    pictures: Sequence[Picture], ranged: int, advance: Callable[[str, int, int], None]
) -> tuple[str, ...]:
    """The pictures' hashes."""
    hashes, plain, bad = list[str](), 0, list[str]()
    for place, read in enumerate(pictures):
        try:
            sample = read()
        except (SourceError, DatasetError) as exc:
            bad.append(str(exc))
            continue
        is_file = sample.labels.size == 0
        own = hashlib.sha256(sample.image.tobytes()).hexdigest
        hashes.append(sha256_of(Path(sample.name)) if is_file else own())
        plain += place < ranged and bool((sample.image == sample.image[0, 0]).all())
        advance("read", place + 1, len(pictures))
    if bad:
        more = f" (and {len(bad) - _MOST_NAMED} more)" if len(bad) > _MOST_NAMED else ""
        raise SourceError("; ".join(bad[:_MOST_NAMED]) + more)
    if plain == ranged:
        raise ArgumentError(
            f"photos: expected pictures with content, got {plain} of one colour each. Give "
            "pictures of what will be labelled."
        )
    return tuple(hashes)


def _require(count: int, fewest: int, argument: str, where: str) -> None:
    if count < fewest:
        raise ArgumentError(
            f"{argument}: expected at least {fewest} pictures (64 are better), found {count} in "
            f"{where}. Add more."
        )


# --- measuring ---

Advance = Callable[[str, int, int], None]
"""Called with what is done, how often it was done, and how often it will be."""


Figures = dict[str, float]
"""mIoU in percent: of all classes, seen and unseen ones; see
:class:`zsseg_rt.bundles.quantization.MaskLoss`."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Float32's labels of the measured images, and its mIoU."""

    pictures: tuple[Picture, ...]  # The pictures
    vocabulary: Vocabulary  # The classes
    labels: tuple[npt.NDArray[np.intp], ...]  # Per picture, the best class of each cell, [gh, gw]
    clear: tuple[npt.NDArray[np.bool_], ...]  # Per picture, where it is clear, bool [gh, gw]
    dataset: SegmentationDataset | None  # What pictures and masks are from; None without masks
    miou: Figures  # What it reaches on the masks; empty without
    golden: bool  # Whether candidates are compared with the golden sample too


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Shares of cells with float32's label, where it is clear and everywhere; mIoU with masks.

    ``golden`` is how far the golden sample is off, by stage.
    """

    clear: float
    everywhere: float
    miou: Figures = field(default_factory=dict)
    golden: dict[str, float] = field(default_factory=dict)


def engine_config(precision: str, *, num_lanes: int = 1) -> EngineConfig:
    """The engine that measures: on the CPU, without a cache, with every class's scores."""
    return EngineConfig(
        device="cpu", backend="openvino", precision=precision, use_cache=False,
        with_class_scores="low", num_lanes=num_lanes,
    )  # fmt: skip


def take_reference(engine: Engine, pictures: Pictures, advance: Advance) -> Reference:
    """Label pictures with a float32 engine whose classes are named."""
    assert engine.vocabulary is not None
    labels, clear, masks = [], [], _Masks(pictures.dataset)
    for place, read in enumerate(pictures.measured):
        scores = _scores(engine, read(), masks)
        ranked = np.sort(scores, axis=0)
        second = ranked[-2] if len(ranked) > 1 else np.full_like(ranked[-1], -np.inf)
        labels.append(scores.argmax(axis=0))
        clear.append(ranked[-1] - second > CLEAR * np.abs(ranked[-1]))
        advance("float32", place + 1, len(pictures.measured))
    _check_clear(labels, clear, engine.vocabulary.names)
    if pictures.dataset is not None and not masks.figures():
        raise ArgumentError(
            f"dataset: expected masks that hold a class, got {len(labels)} without in "
            f"{pictures.dataset.name}. Give pictures with annotations."
        )
    return Reference(
        pictures=pictures.measured,
        vocabulary=engine.vocabulary,
        labels=tuple(labels),
        clear=tuple(clear),
        dataset=pictures.dataset,
        miou=masks.figures(),
        golden=engine.bundle.golden is not None,
    )


def _check_clear(
    labels: Sequence[npt.NDArray[Any]], clear: Sequence[npt.NDArray[Any]], names: Sequence[str]
) -> None:
    """Refuse pictures without a clear label; warn of one label everywhere, which is easily kept."""
    best = {int(label) for rows, cells in zip(labels, clear, strict=True) for label in rows[cells]}
    if not best:
        raise ArgumentError(
            f"class_names: expected some that float32 is sure of in {len(clear)} pictures, got "
            "none. Name what the pictures show."
        )
    if len(best) == 1:
        _log.warning(
            "class_names: float32 gives every clear cell of %d pictures the label %r, so agreement "
            "proves little. Name what the pictures show.",
            *(len(clear), names[best.pop()]),
        )


def measure(bundle: Bundle, precision: str, reference: Reference) -> Agreement:
    """Run a candidate on the reference's pictures."""
    same, counted, same_anywhere, cells = 0, 0, 0, 0
    masks = _Masks(reference.dataset)
    with Engine(bundle, engine_config(precision)) as engine:
        engine.set_classes(reference.vocabulary)
        for read, labels, clear in zip(
            reference.pictures, reference.labels, reference.clear, strict=True
        ):
            equal = _scores(engine, read(), masks).argmax(axis=0) == labels
            same += int(equal[clear].sum())
            counted += int(clear.sum())
            same_anywhere += int(equal.sum())
            cells += equal.size
        stages = engine.self_check().stages if reference.golden else ()
    return Agreement(
        clear=same / counted if counted else 1.0,
        everywhere=same_anywhere / cells,
        miou=masks.figures(),
        golden={one.stage: round(one.error, 4) for one in stages if one.stage != "labels"},
    )


class _Masks:
    """Compares labels with a data set's masks; without one it does nothing."""

    def __init__(self, dataset: SegmentationDataset | None) -> None:
        self._seen = () if dataset is None else dataset.seen
        self._counts = None
        if dataset is not None:
            count = len(dataset.class_names)
            self._counts = ConfusionMatrix(count, ignore_label=dataset.ignore_label)

    def add(self, sample: Sample, labels: npt.NDArray[Any]) -> None:
        """Count one picture."""
        if self._counts is not None:
            self._counts.update(sample.labels, labels)

    def figures(self) -> Figures:
        """The mIoU of classes that the masks hold: one stray pixel of another changes nothing."""
        if self._counts is None:
            return {}
        scores = score(self._counts.counts, self._seen)
        present = scores.true_pixels > 0
        seen = np.isin(np.arange(len(present)), self._seen)
        groups = {"mIoU": present, "mIoU(S)": present & seen, "mIoU(U)": present & ~seen}
        return {
            name: round(100 * float(scores.iou[of].mean()), 3)
            for name, of in groups.items()
            if of.any()
        }


def candidate(
    bundle: Bundle, folder: Path, graphs: Mapping[str, Network], precision: str
) -> Bundle:
    """A bundle with these graphs in place of its own or beside them, in an empty folder.

    INT8 graphs are run as they are. For FP8 they are float32 graphs that round as FP8 does.
    """
    folder.mkdir()
    entries = {
        name: {"float32": variants["float32"]}
        for name, variants in bundle.graphs.items()
        if "float32" in variants
    }
    for entry in replace(bundle, graphs=entries).files():
        link_or_copy(bundle.open_path(entry), folder / entry.file)
    entered = "int8" if precision == "int8" else "float32"
    for name, model in graphs.items():
        entries[name][entered] = write_graph(model, name, folder, precision)
    return replace(bundle, path=folder, graphs=entries, quantization={})


def write_graph(model: Network, name: str, folder: Path, precision: str) -> GraphEntry:
    """Write ``NAME.PRECISION.onnx`` and describe it."""
    path = folder / f"{name}.{precision}.onnx"
    save_onnx(model, name, path)
    return describe_graph(path, folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file into another folder; without a copy where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _scores(engine: Engine, sample: Sample, masks: _Masks) -> npt.NDArray[np.float32]:
    """The scores behind the labels, float32 [C, gh, gw]: seen classes have lost their bias."""
    result, vocabulary, head = engine.segment(sample.image), engine.vocabulary, engine.bundle.head
    masks.add(sample, result.labels)
    assert result.class_scores is not None
    assert vocabulary is not None
    seen = vocabulary.seen(head.seen)
    if seen is None or not head.seen_bias:
        return result.class_scores
    lowered = vocabulary.best_of_synonyms(np.float32(-head.seen_bias) * seen)
    return np.asarray(result.class_scores + lowered[:, None, None], np.float32)
