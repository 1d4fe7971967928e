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

Advance = Callable[[str, int, int], None]
"""Called with what is done, how often it was done, and how often it will be."""

_log = logging.getLogger(__name__)

# --- images: some set ranges, others only measure ---

FEWEST, MOST = 8, 512
_MOST_MEASURED = 128
_MOST_NAMED = 5  # of images that cannot be read
_HELD_BACK = 4  # one image in so many is measured on, and gives no ranges

Picture = Callable[[], Sample]
"""Reads an image; without a data set its labels are empty."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images that give ranges, and others that are measured on; none is in both."""

    ranged: tuple[Picture, ...]
    measured: tuple[Picture, ...]
    hashes: tuple[str, ...]  # Their SHA-256, those of files, or of a data set's pixels
    # What the measured ones and their masks are from; None without masks
    dataset: SegmentationDataset | None


def choose_pictures(
    photos: Path | None,
    dataset: SegmentationDataset | None,
    advance: Advance = lambda what, done, total: None,
) -> Pictures:
    """Choose images, and read each once, so that none stops the work that follows.

    Ranges are from the photos and figures from the data set; of one of them alone, a quarter is
    held back to measure on.
    """
    rng = np.random.default_rng(0)
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
            "photos: expected a folder of images or a data set, got neither. Give one of them."
        )
    hashes = _checked([*ranged, *measured], len(ranged), advance)
    return Pictures(
        ranged=tuple(ranged), measured=tuple(measured), hashes=tuple(hashes), dataset=dataset
    )


def _read(photo: Path) -> Sample:
    return Sample(image=read_photo(photo), labels=np.zeros((0, 0), np.uint8), name=str(photo))


def _checked(pictures: Sequence[Picture], ranged: int, advance: Advance) -> list[str]:
    """The images' hashes."""
    hashes, plain, bad = list[str](), 0, list[str]()
    for place, read in enumerate(pictures):
        try:
            sample = read()
        except (SourceError, DatasetError) as exc:
            bad.append(str(exc))
            continue
        own = hashlib.sha256(sample.image.tobytes()).hexdigest
        hashes.append(own() if sample.labels.size else sha256_of(Path(sample.name)))
        plain += place < ranged and bool((sample.image == sample.image[0, 0]).all())
        advance("read", place + 1, len(pictures))
    if bad:
        more = f" (and {len(bad) - _MOST_NAMED} more)" if len(bad) > _MOST_NAMED else ""
        raise SourceError("; ".join(bad[:_MOST_NAMED]) + more)
    if plain == ranged:
        raise ArgumentError(
            f"photos: expected images with content, got {plain} of one colour each. Give "
            "images of what will be labelled."
        )
    return hashes


def _require(count: int, fewest: int, argument: str, where: str) -> None:
    if count < fewest:
        raise ArgumentError(
            f"{argument}: expected at least {fewest} images (64 are better), got {count} in "
            f"{where}. Add more."
        )


# --- measuring ---

Figures = dict[str, float]
"""mIoU in percent: of all classes, seen and unseen ones; see
:class:`zsseg_rt.bundles.quantization.MaskLoss`."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Float32's labels of the measured images, and its mIoU."""

    pictures: Pictures
    vocabulary: Vocabulary
    labels: Sequence[npt.NDArray[np.intp]]  # Per image, the best class of each cell, [gh, gw]
    clear: Sequence[npt.NDArray[np.bool_]]  # Per image, where it is clear, bool [gh, gw]
    miou: Figures  # Empty without masks
    golden: bool  # Whether candidates are compared with the golden sample too


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Shares of cells with float32's label, where it is clear and everywhere."""

    clear: float
    everywhere: float
    miou: Figures = field(default_factory=dict)
    golden: dict[str, float] = field(default_factory=dict)  # How far its sample is off, by stage


def engine_config(precision: str, *, num_lanes: int = 1) -> EngineConfig:
    """The engine that measures: on the CPU, without a cache, with every class's scores."""
    return EngineConfig(
        device="cpu", backend="openvino", precision=precision, use_cache=False,
        with_class_scores="low", num_lanes=num_lanes,
    )  # fmt: skip


def take_reference(engine: Engine, pictures: Pictures, advance: Advance) -> Reference:
    """Label images with a float32 engine whose classes are named."""
    assert engine.vocabulary is not None
    labels, clear, masks = [], [], _counts(pictures)
    for place, read in enumerate(pictures.measured):
        scores = _scores(engine, read(), masks)
        ranked = np.sort(scores, axis=0)
        second = ranked[-2] if len(ranked) > 1 else np.full_like(ranked[-1], -np.inf)
        labels.append(scores.argmax(axis=0))
        clear.append(ranked[-1] - second > CLEAR * np.abs(ranked[-1]))
        advance("float32", place + 1, len(pictures.measured))
    best = {int(label) for rows, cells in zip(labels, clear, strict=True) for label in rows[cells]}
    if not best:
        raise ArgumentError(
            f"class_names: expected some that float32 is sure of in {len(clear)} images, got "
            "none. Name what the images show."
        )
    if len(best) == 1:
        _log.warning(
            "class_names: float32 gives every clear cell of %d images the label %r, so agreement "
            "proves little. Name what the images show.",
            *(len(clear), engine.vocabulary.names[best.pop()]),
        )
    miou = _figures(masks, pictures)
    if pictures.dataset is not None and not miou:
        raise ArgumentError(
            f"dataset: expected masks that hold a class, got {len(labels)} without in "
            f"{pictures.dataset.name}. Give images with annotations."
        )
    return Reference(
        pictures=pictures,
        vocabulary=engine.vocabulary,
        labels=labels,
        clear=clear,
        miou=miou,
        golden=engine.bundle.golden is not None,
    )


def measure(bundle: Bundle, precision: str, reference: Reference) -> Agreement:
    """Run a candidate on the reference's images."""
    equal, clear, masks = [], np.concatenate(reference.clear, None), _counts(reference.pictures)
    with Engine(bundle, engine_config(precision)) as engine:
        engine.set_classes(reference.vocabulary)
        for read, labels in zip(reference.pictures.measured, reference.labels, strict=True):
            equal.append(_scores(engine, read(), masks).argmax(axis=0) == labels)
        stages = engine.self_check().stages if reference.golden else ()
    same = np.concatenate(equal, None)
    return Agreement(
        clear=float(same[clear].mean()),
        everywhere=float(same.mean()),
        miou=_figures(masks, reference.pictures),
        golden={one.stage: round(one.error, 4) for one in stages if one.stage != "labels"},
    )


def _counts(pictures: Pictures) -> ConfusionMatrix | None:
    data = pictures.dataset
    if data is None:
        return None
    return ConfusionMatrix(len(data.class_names), ignore_label=data.ignore_label)


def _figures(counts: ConfusionMatrix | None, pictures: Pictures) -> Figures:
    """The mIoU of classes that the masks hold: one stray pixel of another changes nothing."""
    if counts is None or pictures.dataset is None:
        return {}
    scores = score(counts.counts, pictures.dataset.seen)
    present = scores.true_pixels > 0
    seen = np.isin(np.arange(len(present)), pictures.dataset.seen)
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

    Those of FP8 are float32 graphs that round as FP8 does.
    """
    folder.mkdir()
    entries = {
        name: {"float32": variants["float32"]}
        for name, variants in bundle.graphs.items()
        if "float32" in variants
    }
    for entry in replace(bundle, graphs=entries).files():
        source, target = bundle.open_path(entry), folder / entry.file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), target)
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
    entered = "int8" if precision == "int8" else "float32"
    for name, model in graphs.items():
        entries[name][entered] = write_graph(model, name, folder, precision)
    return replace(bundle, path=folder, graphs=entries, quantization={})


def write_graph(model: Network, name: str, folder: Path, precision: str) -> GraphEntry:
    """Write ``NAME.PRECISION.onnx`` and describe it."""
    path = folder / f"{name}.{precision}.onnx"
    save_onnx(model, name, path)
    return describe_graph(path, folder)


def _scores(
    engine: Engine, sample: Sample, masks: ConfusionMatrix | None
) -> npt.NDArray[np.float32]:
    """The scores behind the labels, float32 [C, gh, gw]: seen classes have lost their bias."""
    result, vocabulary, head = engine.segment(sample.image), engine.vocabulary, engine.bundle.head
    if masks is not None:
        masks.update(sample.labels, result.labels)
    assert result.class_scores is not None
    assert vocabulary is not None
    seen = vocabulary.seen(head.seen)
    if seen is None or not head.seen_bias:
        return result.class_scores
    lowered = vocabulary.best_of_synonyms(np.float32(-head.seen_bias) * seen)
    return np.asarray(result.class_scores + lowered[:, None, None], np.float32)
