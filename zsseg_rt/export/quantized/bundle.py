"""Quantise a bundle: calibrate, measure, leave the worst layers in float16, write what passed."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import FAMILIES, MaskLoss, QuantizationSpec
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.common.checks import check_choice, check_range
from zsseg_rt.common.files import sha256_of
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError, DatasetError, SourceError
from zsseg_rt.evaluation.datasets.base import Sample, SegmentationDataset
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.export.bundle_writer import check_bundle_place, new_bundle_folder, write_manifest
from zsseg_rt.export.graph_files import describe_graph
from zsseg_rt.export.quantized.layers import (
    FORMATS,
    Group,
    Range,
    TensorStats,
    choose_range,
    find_groups,
    quantised_graph,
    read_plain,
)
from zsseg_rt.onnx.check import Flow
from zsseg_rt.onnx.network import Network
from zsseg_rt.onnx.writer import save_onnx
from zsseg_rt.photos import find_photos, read_photo
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.text.class_names import ClassNames
from zsseg_rt.text.vocabulary import Vocabulary

_CHOSEN = {"proposals": ("region_encoder",)}  # 97 % of ZegFormer's work; masks stay as they are

_log = logging.getLogger(__name__)

CLEAR = 0.1
"""A label is clear where the winner's score is ahead of the second by this share of itself."""

Advance = Callable[[str, int, int], None]
"""Called with what is done, how often it was done, and how often it will be."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """How a bundle is quantised."""

    precision: str = "int8"  # "int8" or "fp8"
    min_agreement: float = 0.98  # Share of clear cells that must keep float32's label
    # Points of mIoU that may be lost where masks are given, and by which unseen classes may lose
    # more than seen ones
    max_miou_loss: float = 0.5
    overwrite: bool = False  # Whether to replace an existing bundle

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, FORMATS)
        check_range(self, "min_agreement", least=1e-9, most=1)
        check_range(self, "max_miou_loss", most=100)


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """The measured losses, and whether a bundle was written."""

    precision: str  # "int8" or "fp8"
    spec: QuantizationSpec  # What bundle.json says of it
    path: str | None  # The bundle, or None if the gate did not hold


def quantize_bundle(
    bundle: Bundle,
    out: Path,
    photos: Path | None,
    class_names: ClassNames,
    settings: QuantizeSettings | None = None,
    advance: Advance = lambda what, done, total: None,
    *,
    dataset: SegmentationDataset | None = None,
) -> QuantizeReport:
    """Write a bundle that also holds its graphs in INT8 or FP8, if they agree with float32.

    Args:
        bundle: Holds its graphs in float32.
        out: The bundle to write, ``NAME.zsseg``.
        photos: A folder with 8 images or more; of more than 512, 512 are taken. None takes those
            of the data set.
        class_names: What the images are labelled with.
        settings: Precision and gate.
        advance: Called with progress.
        dataset: Images with masks, on which mIoU is measured; ``class_names`` has its classes in
            its order.
    """
    settings = settings or QuantizeSettings()
    _check(bundle, out, class_names, settings, dataset)
    images = choose_images(photos, dataset, advance)
    with tempfile.TemporaryDirectory(prefix=".quantize-") as scratch:
        job = _Job(bundle, settings, advance, Path(scratch))
        spec, layers = job.search(job.calibrate(images, class_names))
    if spec.passed:
        job.write(out, spec, layers)
    path = str(out) if spec.passed else None
    return QuantizeReport(precision=settings.precision, spec=spec, path=path)


class _Job:
    """One bundle on its way."""

    def __init__(
        self, bundle: Bundle, settings: QuantizeSettings, advance: Advance, folder: Path
    ) -> None:
        self._bundle, self._settings, self._advance = bundle, settings, advance
        self._folder, self._kind = folder, FORMATS[settings.precision]
        self._models = {
            name: read_plain(bundle.open_path(bundle.graph(name, "float32")))
            for name in create_family(bundle, EngineConfig()).graphs
        }
        graphs = set(self._models) & set(_CHOSEN.get(bundle.family, self._models))
        self._layers = [
            group
            for name, model in self._models.items()
            for group in (find_groups(model, name) if name in graphs or not graphs else ())
        ]
        if not self._layers:
            raise ArgumentError(
                "bundle: expected linear layers or convolutions with stored weights that these "
                f"classes use, got none in {bundle.name}. It cannot be quantised."
            )
        self._ranges: dict[Group, Range] = {}

    def calibrate(self, images: Images, class_names: ClassNames) -> Reference:
        """Find every range, and what float32 makes of the images that are held back."""
        stats = {layer: TensorStats() for layer in self._layers}
        rng = np.random.default_rng(0)
        taps = {name: self._tapped(name) for name in self._models}
        with _open(self._bundle, "float32", num_lanes=2) as engine:
            engine.set_classes(class_names, background=())
            with engine.lane() as lane:
                for place, read in enumerate(images.ranged):
                    for name, feeds in lane.graph_inputs(read().image).items():
                        for feed in feeds if name in taps else ():
                            values = {**feed, **taps[name].run(feed)}
                            for group, one in stats.items():
                                if group.graph == name:
                                    tensor = np.asarray(values[group.tensor])
                                    one.add(tensor, convolves=group.convolves, rng=rng)
                    self._advance("calibrate", place + 1, len(images.ranged))
            reference = _take_reference(engine, images, self._advance)
        for session in taps.values():
            session.close()
        self._layers = [layer for layer in self._layers if stats[layer].rows]
        reached = [layer for layer in self._layers if stats[layer].largest]
        if not reached:
            raise ArgumentError(
                f"photos: expected images that reach layers of {self._bundle.name}, got zeros "
                f"before all {len(self._layers)}. Give others."
            )
        for place, layer in enumerate(reached):
            model = self._models[layer.graph]
            self._ranges[layer] = choose_range(model, layer, stats[layer], self._kind)
            self._advance("choose ranges", place + 1, len(reached))
        return reference

    def search(self, reference: Reference) -> tuple[QuantizationSpec, list[Group]]:
        """Quantise everything, then less and less, until the gate holds or nothing is left."""
        ranked = sorted(self._ranges, key=lambda layer: -self._ranges[layer].error)
        dropped = 0
        while True:
            layers = [layer for layer in self._ranges if layer not in ranked[:dropped]]
            spec = self._measure(layers, reference)
            dropped = 2 * dropped or 1
            if spec.passed or dropped >= len(ranked):
                return spec, layers

    def write(self, out: Path, spec: QuantizationSpec, layers: Sequence[Group]) -> None:
        """Write the bundle whole or not at all."""
        kind = self._kind.name
        with new_bundle_folder(out, overwrite=self._settings.overwrite, verify=True) as folder:
            precisions = {each for variants in self._bundle.graphs.values() for each in variants}
            others = precisions - {kind}
            new = _with_graphs(self._bundle, folder, others, self._graphs(layers), kind, kind)
            quantization = {**self._bundle.quantization, kind: spec}
            write_manifest(folder, replace(new, name=out.stem, quantization=quantization))

    def _graphs(self, layers: Sequence[Group], *, emulated: bool = False) -> dict[str, Network]:
        """The graphs that have chosen layers; others run beside them in another precision."""
        named = {layer.graph for layer in layers}
        others = [self._bundle.graphs[name] for name in self._models if name not in named]
        # TensorRT takes the others in float16 if it can, and their edges must fit
        fits = all("float16" in variants for variants in others)
        half = FAMILIES[self._bundle.family].half_tensors if fits else ()
        graphs = {}
        for name in filter(named.__contains__, self._models):
            model = self._models[name]
            ranges = {layer: self._ranges[layer] for layer in layers if layer.graph == name}
            graphs[name] = quantised_graph(model, ranges, self._kind, half, emulated=emulated)
        return graphs

    def _measure(self, layers: Sequence[Group], reference: Reference) -> QuantizationSpec:
        kind = self._kind.name
        computed = "int8" if kind == "int8" else "float32"  # which rounds as FP8 does
        graphs = self._graphs(layers, emulated=kind == "fp8")
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            new = _with_graphs(self._bundle, Path(folder), {"float32"}, graphs, kind, computed)
            agreement = measure(replace(new, quantization={}), computed, reference)
        precisions: dict[str, dict[str, str]] = {name: {} for name in self._models}
        for layer in self._layers:
            precisions[layer.graph][layer.name] = kind if layer in layers else "float16"
        masks, images = None, reference.images
        if images.dataset is not None:
            masks = MaskLoss(
                dataset=images.dataset.name,
                float32=reference.miou,
                narrow=agreement.miou,
                most=self._settings.max_miou_loss,
            )
        return QuantizationSpec(
            agreement=agreement.clear,
            agreement_of_all=agreement.everywhere,
            min_agreement=self._settings.min_agreement,
            photos=images.hashes,
            measured_photos=len(images.measured),
            classes=tuple(reference.vocabulary.names),
            layers=precisions,
            masks=masks,
            golden=agreement.golden,
        )

    def _tapped(self, name: str) -> Any:
        """A session that also gives what every layer reads."""
        network = self._models[name]
        values = Flow(network).run().values
        wanted = {group.tensor for group in self._layers if group.graph == name}
        wanted -= {spec.name for spec in (*network.outputs, *network.inputs)}
        more = [
            TensorSpec(
                name=tensor,
                dtype="float32",
                shape=tuple("?" if size is None else size for size in values[tensor].shape),
            )
            for tensor in values
            if tensor in wanted
        ]
        path = self._folder / f"{name}.taps.onnx"
        save_onnx(replace(network, outputs=(*network.outputs, *more)), name, path)
        options = BackendOptions()
        backend = get_backend("openvino")
        return backend.load(path, device="cpu", precision="float32", options=options).session()


def _check(
    bundle: Bundle,
    out: Path,
    class_names: ClassNames,
    settings: QuantizeSettings,
    dataset: SegmentationDataset | None,
) -> None:
    """Refuse what must fail, before anything is read or computed."""
    spec = FAMILIES[bundle.family]
    if not spec.has_class_logits and bundle.regions is None:
        raise ArgumentError(
            f"bundle: expected a family whose cells have scores of classes, got {bundle.family}: a "
            "hard choice inside its graph gives every cell to a segment, and rounding moves whole "
            "segments. Use float32."
        )
    if dataset is not None and len(class_names) != len(dataset.class_names):
        raise ArgumentError(
            f"class_names: expected {len(dataset.class_names)}, one for each class of "
            f"{dataset.name}, got {len(class_names)}. Keep the data set's order."
        )
    if len(class_names) < 2:
        raise ArgumentError(
            f"class_names: expected two or more, got {len(class_names)}: images with one name "
            "always agree. Name what they show."
        )
    if settings.precision == "int8":
        precisions = ("int8", "float32")  # asks what this CPU does
        get_backend("openvino").choose(precisions, "int8", device="cpu", allowed=precisions)
    check_bundle_place(out, overwrite=settings.overwrite)


# --- images: some set ranges, others only measure ---

FEWEST, MOST = 8, 512
_MOST_MEASURED = 128
_MOST_NAMED = 5  # of images that cannot be read
_HELD_BACK = 4  # one image in so many is measured on, and gives no ranges

ImageReader = Callable[[], Sample]
"""Reads an image; without a data set its labels are empty."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images that give ranges, and others that are measured on; none is in both."""

    ranged: tuple[ImageReader, ...]
    measured: tuple[ImageReader, ...]
    hashes: tuple[str, ...]  # Their SHA-256, those of files, or of a data set's pixels
    # What the measured ones and their masks are from; None without masks
    dataset: SegmentationDataset | None


def choose_images(
    photos: Path | None,
    dataset: SegmentationDataset | None,
    advance: Advance = lambda what, done, total: None,
) -> Images:
    """Choose images, and read each once, so that none stops the work that follows.

    Ranges are from the photos and figures from the data set; of one of them alone, a quarter is
    held back to measure on.
    """
    rng = np.random.default_rng(0)
    ranged: list[ImageReader] = []
    if photos is not None:
        files = find_photos([str(photos)])
        _require(len(files), FEWEST, "photos", str(photos))
        ranged = [partial(_read, files[place]) for place in rng.permutation(len(files))[:MOST]]
    measured: list[ImageReader] = []
    if dataset is not None:
        _require(len(dataset), 2 if ranged else FEWEST, "dataset", dataset.name)
        order = rng.permutation(len(dataset))[:MOST]
        measured = [partial(dataset.__getitem__, int(place)) for place in order]
    if ranged and measured:
        measured = measured[:_MOST_MEASURED]
    else:
        both = ranged + measured
        count = min(max(2, len(both) // _HELD_BACK), _MOST_MEASURED)
        ranged, measured = both[:-count], both[-count:]
    if not ranged:
        raise ArgumentError(
            "photos: expected a folder of images or a data set, got neither. Give one of them."
        )
    hashes = _hashes([*ranged, *measured], advance)
    return Images(ranged=tuple(ranged), measured=tuple(measured), hashes=hashes, dataset=dataset)


def _read(photo: Path) -> Sample:
    return Sample(image=read_photo(photo), labels=np.zeros((0, 0), np.uint8), name=str(photo))


def _hashes(images: Sequence[ImageReader], advance: Advance) -> tuple[str, ...]:
    hashes, bad = list[str](), list[str]()
    for place, read in enumerate(images):
        try:
            sample = read()
        except (SourceError, DatasetError) as exc:
            bad.append(str(exc))
            continue
        own = hashlib.sha256(sample.image.tobytes()).hexdigest
        hashes.append(own() if sample.labels.size else sha256_of(Path(sample.name)))
        advance("read", place + 1, len(images))
    if bad:
        more = f" (and {len(bad) - _MOST_NAMED} more)" if len(bad) > _MOST_NAMED else ""
        raise SourceError("; ".join(bad[:_MOST_NAMED]) + more)
    return tuple(hashes)


def _require(count: int, fewest: int, argument: str, where: str) -> None:
    if count < fewest:
        raise ArgumentError(
            f"{argument}: expected at least {fewest} images (64 are better), got {count} in "
            f"{where}. Add more."
        )


# --- measuring ---

Figures = dict[str, float]
"""mIoU in percent: of all classes, seen and unseen ones; see
:class:`zsseg_rt.bundles.specs.MaskLoss`."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Float32's labels of the measured images, and its mIoU."""

    images: Images
    vocabulary: Vocabulary
    labels: npt.NDArray[np.intp]  # The best class of each cell of all images
    clear: npt.NDArray[np.bool_]  # Where it is clear
    miou: Figures  # Empty without masks


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Shares of cells with float32's label, where it is clear and everywhere."""

    clear: float
    everywhere: float
    miou: Figures = field(default_factory=dict)
    golden: dict[str, float] = field(default_factory=dict)  # How far its sample is off, by stage


def _open(bundle: Bundle, precision: str, *, num_lanes: int = 1) -> Engine:
    """The engine that measures: on the CPU, without a cache, with every class's scores."""
    return Engine(bundle, EngineConfig(
        device="cpu", backend="openvino", precision=precision, use_cache=False,
        with_class_scores="low", num_lanes=num_lanes,
    ))  # fmt: skip


def _take_reference(engine: Engine, images: Images, advance: Advance) -> Reference:
    """Label images with a float32 engine whose classes are named."""
    labels, clear, miou = _label(engine, images, advance)
    assert engine.vocabulary is not None
    best = np.unique(labels[clear])
    if not len(best):
        raise ArgumentError(
            f"class_names: expected some that float32 is sure of in {len(images.measured)} images, "
            "got none. Name what the images show."
        )
    if len(best) == 1:
        _log.warning(
            "class_names: float32 gives every clear cell of %d images the label %r, so agreement "
            "proves little. Name what the images show.",
            *(len(images.measured), engine.vocabulary.names[int(best[0])]),
        )
    if images.dataset is not None and not miou:
        raise ArgumentError(
            f"dataset: expected masks that hold a class, got {len(images.measured)} without in "
            f"{images.dataset.name}. Give images with annotations."
        )
    vocabulary = engine.vocabulary
    return Reference(images=images, vocabulary=vocabulary, labels=labels, clear=clear, miou=miou)


def measure(bundle: Bundle, precision: str, reference: Reference) -> Agreement:
    """Run a candidate on the reference's images."""
    with _open(bundle, precision) as engine:
        engine.set_classes(reference.vocabulary)
        labels, _, miou = _label(engine, reference.images)
        stages = () if bundle.golden is None else engine.self_check().stages
    same = labels == reference.labels
    return Agreement(
        clear=float(same[reference.clear].mean()),
        everywhere=float(same.mean()),
        miou=miou,
        golden={one.stage: round(one.error, 4) for one in stages if one.stage != "labels"},
    )


def _label(
    engine: Engine, images: Images, advance: Advance = lambda what, done, total: None
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_], Figures]:
    """Every cell's best class, whether it is clear, and the mIoU where there are masks."""
    data, vocabulary, head = images.dataset, engine.vocabulary, engine.bundle.head
    masks = None
    if data is not None:
        masks = ConfusionMatrix(len(data.class_names), ignore_label=data.ignore_label)
    assert vocabulary is not None
    seen = vocabulary.seen(head.seen)
    bias: Any = 0.0
    if seen is not None:  # as labels are made
        bias = vocabulary.best_of_synonyms(np.float32(-head.seen_bias) * seen)[:, None, None]
    labels, clear = [], []
    for place, read in enumerate(images.measured):
        sample = read()
        result = engine.segment(sample.image)
        if masks is not None:
            masks.update(sample.labels, result.labels)
        assert result.class_scores is not None
        scores = result.class_scores + bias
        second, first = np.sort(scores, axis=0)[-2:]
        labels.append(scores.argmax(axis=0))
        clear.append(first - second > CLEAR * np.abs(first))
        advance("float32", place + 1, len(images.measured))
    miou = {} if masks is None or data is None else _miou(masks, data)
    return np.concatenate(labels, None), np.concatenate(clear, None), miou


def _miou(masks: ConfusionMatrix, data: SegmentationDataset) -> Figures:
    """Of classes that the masks hold: one stray pixel of another changes nothing."""
    scores = score(masks.counts, data.seen)
    present = scores.true_pixels > 0
    seen = np.isin(np.arange(len(present)), data.seen)
    groups = {"mIoU": present, "mIoU(S)": present & seen, "mIoU(U)": present & ~seen}
    return {
        name: round(100 * float(scores.iou[of].mean()), 3)
        for name, of in groups.items()
        if of.any()
    }


def _with_graphs(
    bundle: Bundle,
    folder: Path,
    kept: Collection[str],
    graphs: Mapping[str, Network],
    precision: str,
    entered: str,
) -> Bundle:
    """The bundle in an empty folder, with its graphs in kept precisions and with new ones."""
    entries = {
        name: {
            key: entry
            for key, entry in variants.items()
            if key in kept and not (name in graphs and key == entered)
        }
        for name, variants in bundle.graphs.items()
    }
    for entry in replace(bundle, graphs=entries).files():
        target = folder / entry.file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.open_path(entry), target)
    for name, network in graphs.items():
        path = folder / f"{name}.{precision}.onnx"
        save_onnx(network, name, path)
        entries[name][entered] = describe_graph(path, folder)
    return replace(bundle, path=folder, graphs=entries)
