"""Quantise a bundle: calibrate, measure, leave the worst layers in float16, write what passed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.quantization import MaskLoss, QuantizationSpec
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.common.checks import check_choice
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets.base import SegmentationDataset
from zsseg_rt.export.bundle_writer import check_bundle_place, new_bundle_folder, write_manifest
from zsseg_rt.export.quantized.layers import (
    FORMATS,
    Group,
    Range,
    TensorStats,
    choose_range,
    emulated_graph,
    find_groups,
    quantised_graph,
    read_plain,
)
from zsseg_rt.export.quantized.measure import (
    Advance,
    Agreement,
    Pictures,
    Reference,
    candidate,
    choose_pictures,
    engine_config,
    measure,
    take_reference,
    write_graph,
)
from zsseg_rt.onnx.flow import Flow
from zsseg_rt.onnx.network import Network
from zsseg_rt.onnx.writer import save_onnx
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.text.class_names import ClassNames

_CHOSEN = {"proposals": ("region_encoder",)}  # 97 % of ZegFormer's work; masks stay as they are

Layer = tuple[str, Group]
"""A graph's name and a group of its layers."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """How a bundle is quantised."""

    precision: str = "int8"  # "int8" or "fp8"
    min_agreement: float = 0.98  # Share of clear cells that must keep float32's label
    # Points of mIoU that may be lost where masks are given, and by which unseen classes may lose
    # more than seen ones
    max_miou_loss: float = 0.5
    seed: int = 0  # Chooses pictures and samples
    overwrite: bool = False  # Whether to replace an existing bundle

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, FORMATS)
        if not 0.0 < self.min_agreement <= 1.0:
            raise ArgumentError(
                f"min_agreement: expected above 0 and at most 1, got {self.min_agreement}"
            )
        if not 0.0 <= self.max_miou_loss <= 100.0:
            raise ArgumentError(
                f"max_miou_loss: expected points from 0 to 100, got {self.max_miou_loss}"
            )
        if not 0 <= self.seed < 2**63:
            raise ArgumentError(f"seed: expected from 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One group of layers that read the same tensor."""

    graph: str  # The graph
    name: str  # The first layer of the group
    count: int  # Layers of the group
    precision: str  # What it is written in
    # How its range was found; a layer that read zeros alone has none, and stays as it is
    method: str
    error: float  # Squared error of its results relative to their squares, on the samples


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """The measured losses, and whether a bundle was written."""

    precision: str  # "int8" or "fp8"
    spec: QuantizationSpec  # What bundle.json says of it
    everything: float  # Agreement with every layer quantised
    layers: tuple[LayerReport, ...]  # One row per group
    path: str | None = None  # The bundle, or None if the gate did not hold


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
        photos: A folder with 8 pictures or more; of more than 512, 512 are taken. None takes those
            of the data set.
        class_names: What the pictures are labelled with.
        settings: Precision, gate, seed.
        advance: Called with progress.
        dataset: Pictures with masks, on which mIoU is measured; ``class_names`` has its classes in
            its order.
    """
    settings = settings or QuantizeSettings()
    _check(bundle, out, class_names, settings, dataset)
    pictures = choose_pictures(photos, dataset, settings.seed, advance)
    job = _Job(bundle, settings, advance)
    with tempfile.TemporaryDirectory(prefix=".quantize-") as scratch:
        job.folder = Path(scratch)
        report = job.search(job.calibrate(pictures, class_names))
    report = replace(report, spec=replace(report.spec, photos=pictures.hashes))
    if not report.spec.passed:
        return report
    job.write(out, report)
    return replace(report, path=str(out))


class _Job:
    """One bundle on its way."""

    folder: Path

    def __init__(self, bundle: Bundle, settings: QuantizeSettings, advance: Advance) -> None:
        self._bundle, self._settings, self._advance = bundle, settings, advance
        self._kind = FORMATS[settings.precision]
        self._models = {
            name: read_plain(bundle.open_path(bundle.graph(name, "float32")))
            for name in create_family(bundle, EngineConfig()).graphs
        }
        graphs = set(self._models) & set(_CHOSEN.get(bundle.family, self._models))
        self._layers = [
            (name, group)
            for name, model in self._models.items()
            for group in (find_groups(model) if name in graphs or not graphs else ())
        ]
        self._require_layers()
        self._ranges: dict[Layer, Range] = {}
        self._tried = 0

    def calibrate(self, pictures: Pictures, class_names: ClassNames) -> Reference:
        """Find every range, and what float32 makes of the pictures that are held back."""
        stats: dict[Layer, TensorStats] = {layer: TensorStats() for layer in self._layers}
        rng = np.random.default_rng(self._settings.seed)
        taps = {name: self._tapped(name) for name in self._models}
        with Engine(self._bundle, engine_config("float32", num_lanes=2)) as engine:
            engine.set_classes(class_names, background=())
            with engine.lane() as lane:
                for place, read in enumerate(pictures.ranged):
                    fed = lane.graph_inputs(read().image)
                    for name, feeds in fed.items():
                        for feed in feeds if name in taps else ():
                            values = {**feed, **taps[name].run(feed)}
                            self._take_in(name, values, stats, rng)
                    self._advance("calibrate", place + 1, len(pictures.ranged))
            reference = take_reference(engine, pictures, self._advance)
        for session in taps.values():
            session.close()
        self._layers = [layer for layer in self._layers if stats[layer].rows]
        self._require_layers()
        reached = [layer for layer in self._layers if stats[layer].largest.any()]
        if not reached:
            raise ArgumentError(
                f"photos: expected pictures that reach layers of {self._bundle.name}, got zeros "
                f"before all {len(self._layers)}. Give others."
            )
        for place, layer in enumerate(reached):
            model = self._models[layer[0]]
            self._ranges[layer] = choose_range(model, layer[1], stats[layer], self._kind)
            self._advance("choose ranges", place + 1, len(reached))
        return reference

    def search(self, reference: Reference) -> QuantizeReport:
        """Quantise everything, then less and less, until the gate holds or nothing is left."""
        layers = list(self._ranges)
        everything = self._measure(layers, reference)
        spec = self._spec(layers, everything, reference)
        ranked = sorted(layers, key=lambda layer: -self._ranges[layer].error)
        dropped = 1
        while not spec.passed and dropped < len(ranked):
            layers = [layer for layer in self._ranges if layer not in ranked[:dropped]]
            spec = self._spec(layers, self._measure(layers, reference), reference)
            dropped *= 2
        return QuantizeReport(
            precision=self._kind.name,
            spec=spec,
            everything=everything.clear,
            layers=tuple(self._reports(layers)),
        )

    def write(self, out: Path, report: QuantizeReport) -> None:
        """Write the bundle whole or not at all."""
        layers = [
            (graph, group)
            for graph, group in self._layers
            if report.spec.layers[graph][group.name] == self._kind.name
        ]
        overwrite = self._settings.overwrite
        with new_bundle_folder(out, overwrite=overwrite, verify=True) as folder:
            graphs = {
                name: {kind: entry for kind, entry in variants.items() if kind != self._kind.name}
                for name, variants in self._bundle.graphs.items()
            }
            for entry in replace(self._bundle, graphs=graphs).files():
                target = folder / entry.file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._bundle.open_path(entry), target)
            for name, model in self._graphs(layers).items():
                entry = write_graph(model, name, folder, self._kind.name)
                graphs[name][self._kind.name] = entry
            quantization = {**self._bundle.quantization, self._kind.name: report.spec}
            new = replace(
                self._bundle, path=folder, name=out.stem, graphs=graphs, quantization=quantization
            )
            write_manifest(folder, new)

    def _require_layers(self) -> None:
        if not self._layers:
            raise ArgumentError(
                "bundle: expected linear layers or convolutions with stored weights that these "
                f"classes use, got none in {self._bundle.name}. It cannot be quantised."
            )

    def _graphs(self, layers: Sequence[Layer]) -> dict[str, Network]:
        """The graphs that have chosen layers; others run beside them in another precision."""
        named = {name for name, _ in layers}
        others = [self._bundle.graphs[name] for name in self._models if name not in named]
        # TensorRT takes the others in float16 if it can, and their edges must fit
        fits = all("float16" in variants for variants in others)
        half = FAMILIES[self._bundle.family].half_tensors if fits else ()
        return {
            name: quantised_graph(model, self._of(name, layers), self._kind, half)
            for name, model in self._models.items()
            if name in named
        }

    def _of(self, name: str, layers: Sequence[Layer]) -> dict[Group, Range]:
        """The chosen layers of one graph, and their ranges."""
        return {layer[1]: self._ranges[layer] for layer in layers if layer[0] == name}

    def _measure(self, layers: Sequence[Layer], reference: Reference) -> Agreement:
        self._tried += 1
        folder = self.folder / str(self._tried)
        if self._kind.name == "fp8":
            graphs = {
                name: emulated_graph(model, self._of(name, layers), self._kind)
                for name, model in self._models.items()
                if self._of(name, layers)
            }
        else:
            graphs = self._graphs(layers)
        bundle = candidate(self._bundle, folder, graphs, self._kind.name)
        try:
            usual = "auto" if self._kind.name == "int8" else "float32"
            return measure(bundle, "int8" if usual == "auto" and graphs else usual, reference)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _tapped(self, name: str) -> Any:
        """A session that also gives what every layer reads."""
        network = self._models[name]
        values = Flow(network).run().values
        wanted = {group.tensor for graph, group in self._layers if graph == name}
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
        path = self.folder / f"{name}.taps.onnx"
        save_onnx(replace(network, outputs=(*network.outputs, *more)), name, path)
        backend = get_backend("openvino")
        return backend.load(
            path, device="cpu", precision="float32", options=BackendOptions()
        ).session()

    def _take_in(
        self, name: str, values: Mapping[str, Any], stats: dict[Layer, TensorStats], rng: Any
    ) -> None:
        for layer, one in stats.items():
            if layer[0] == name:
                one.add(np.asarray(values[layer[1].tensor]), convolves=layer[1].convolves, rng=rng)

    def _spec(
        self, layers: Sequence[Layer], agreement: Agreement, reference: Reference
    ) -> QuantizationSpec:
        precisions: dict[str, dict[str, str]] = {name: {} for name in self._models}
        for layer in self._layers:
            precisions[layer[0]][layer[1].name] = self._kind.name if layer in layers else "float16"
        masks = None
        if reference.dataset is not None:
            masks = MaskLoss(
                dataset=reference.dataset.name,
                float32=reference.miou,
                narrow=agreement.miou,
                most=self._settings.max_miou_loss,
            )
        return QuantizationSpec(
            agreement=agreement.clear,
            agreement_of_all=agreement.everywhere,
            min_agreement=self._settings.min_agreement,
            photos=(),
            measured_photos=len(reference.pictures),
            classes=tuple(reference.vocabulary.names),
            layers=precisions,
            seed=self._settings.seed,
            masks=masks,
            golden=agreement.golden,
        )

    def _reports(self, layers: Sequence[Layer]) -> Iterable[LayerReport]:
        for layer in self._layers:
            value_range = self._ranges.get(layer)
            yield LayerReport(
                graph=layer[0],
                name=layer[1].name,
                count=len(layer[1].nodes),
                precision=self._kind.name if layer in layers else "float16",
                method="none: it read zeros alone" if value_range is None else value_range.method,
                error=0.0 if value_range is None else value_range.error,
            )


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
            f"class_names: expected two or more, got {len(class_names)}: pictures with one name "
            "always agree. Name what they show."
        )
    if settings.precision == "int8":
        precisions = ("int8", "float32")  # asks what this CPU does
        get_backend("openvino").choose(precisions, "int8", device="cpu", allowed=precisions)
    check_bundle_place(out, overwrite=settings.overwrite)
