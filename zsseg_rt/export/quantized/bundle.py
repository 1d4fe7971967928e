"""Quantise a bundle: calibrate, measure, leave the worst layers in float16, write what passed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.quantization import QuantizationSpec
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.common.files import sha256_of
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.bundle_writer import new_bundle_folder, write_manifest
from zsseg_rt.export.quantized.calibration import Range, Seen, choose_range
from zsseg_rt.export.quantized.graph import emulated_graph, quantised_graph
from zsseg_rt.export.quantized.layers import Group, find_groups, read_plain
from zsseg_rt.export.quantized.measure import (
    Advance,
    Agreement,
    Reference,
    candidate,
    engine_config,
    measure,
    take_reference,
    write_graph,
)
from zsseg_rt.export.quantized.number_formats import FORMATS
from zsseg_rt.photos.files import find_photos, read_photo
from zsseg_rt.text.class_names import ClassNames

FEWEST_PHOTOS, MOST_PHOTOS = 8, 512
_MOST_MEASURED, _PHOTOS_PER_LAYER = 64, 4
_HELD_BACK = 4  # one picture in so many is measured on, and gives no ranges

Layer = tuple[str, Group]
"""A graph's name and a group of its layers."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """How a bundle is quantised.

    Attributes:
        precision: ``"int8"`` or ``"fp8"``.
        min_agreement: Share of clear cells that must keep float32's label.
        seed: Chooses pictures and samples.
        sensitivity: Whether every layer's own loss is measured, also where the gate holds.
        overwrite: Whether to replace an existing bundle.
    """

    precision: str = "int8"
    min_agreement: float = 0.98
    seed: int = 0
    sensitivity: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.precision not in FORMATS:
            raise ArgumentError(
                f"precision: expected one of {', '.join(FORMATS)}, got {self.precision!r}"
            )
        if not 0.0 < self.min_agreement <= 1.0:
            raise ArgumentError(
                f"min_agreement: expected above 0 and at most 1, got {self.min_agreement}"
            )


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One group of layers that read the same tensor.

    Attributes:
        graph: The graph.
        name: The first layer of the group.
        count: Layers of the group.
        precision: What it is written in.
        method: How its range was found.
        error: Squared error of its results relative to their squares, on the samples.
        lost: Agreement lost when only this group is quantised; None if that was not measured.
    """

    graph: str
    name: str
    count: int
    precision: str
    method: str
    error: float
    lost: float | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What was measured, and whether a bundle was written.

    Attributes:
        precision: ``"int8"`` or ``"fp8"``.
        spec: What ``bundle.json`` says of it.
        everything: Agreement with every layer quantised.
        layers: One row per group.
        path: The bundle, or None if the gate did not hold.
    """

    precision: str
    spec: QuantizationSpec
    everything: float
    layers: tuple[LayerReport, ...]
    path: str | None = None


def quantize_bundle(
    bundle: Bundle,
    out: Path,
    photos: Path,
    class_names: ClassNames,
    settings: QuantizeSettings | None = None,
    advance: Advance = lambda what, done, total: None,
) -> QuantizeReport:
    """Write a bundle that also holds its graphs in INT8 or FP8, if they agree with float32.

    Args:
        bundle: Holds its graphs in float32.
        out: The bundle to write, ``NAME.zsseg``.
        photos: A folder with 8 pictures or more; of more than 512, 512 are taken.
        class_names: What the pictures are labelled with.
        settings: Precision, gate, seed.
        advance: Called with progress.

    Raises:
        ArgumentError: Too few pictures, pictures of one colour, a family without class scores, a
            graph without layers to quantise, or one that is quantised already.
        SourceError: A picture cannot be read.
        PrecisionNotApplied: INT8 on a CPU that does not multiply 8-bit numbers.
        BundleError: The bundle holds no float32 graphs, or ``out`` exists.
    """
    settings = settings or QuantizeSettings()
    _check_family(bundle)
    ranged, measured = _choose_photos(photos, settings.seed)
    job = _Job(bundle, settings, advance)
    with tempfile.TemporaryDirectory(prefix=".quantize-") as scratch:
        job.folder = Path(scratch)
        reference = job.calibrate(ranged, measured, class_names)
        report = job.search(reference)
    hashes = tuple(sha256_of(photo) for photo in (*ranged, *measured))
    report = replace(report, spec=replace(report.spec, photos=hashes))
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
            for name in FAMILIES[bundle.family].graphs
        }
        self._layers = [(n, group) for n, m in self._models.items() for group in find_groups(m)]
        if not self._layers:
            raise ArgumentError(
                f"bundle: expected linear layers or convolutions with stored weights, got none in "
                f"{bundle.name}. It cannot be quantised."
            )
        self._ranges: dict[Layer, Range] = {}
        self._tried = 0

    def calibrate(
        self, ranged: Sequence[Path], measured: Sequence[Path], class_names: ClassNames
    ) -> Reference:
        """Find every range, and what float32 makes of the pictures that are held back."""
        seen: dict[Layer, Seen] = {layer: Seen() for layer in self._layers}
        rng = np.random.default_rng(self._settings.seed)
        taps = {name: self._tapped(name) for name in self._models}
        with Engine(self._bundle, engine_config("float32", num_lanes=2)) as engine:
            engine.set_classes(class_names)
            with engine.lane() as lane:
                for place, photo in enumerate(ranged):
                    fed = lane.graph_inputs(read_photo(photo))
                    for name, feeds in fed.items():
                        for feed in feeds if name in taps else ():
                            values = {**feed, **taps[name].run(feed)}
                            self._take_in(name, values, seen, rng)
                    self._advance("calibrate", place + 1, len(ranged))
            reference = take_reference(engine, measured, self._advance)
        for session in taps.values():
            session.close()
        for place, (layer, found) in enumerate(seen.items()):
            model = self._models[layer[0]]
            self._ranges[layer] = choose_range(model, layer[1], found, self._kind)
            self._advance("choose ranges", place + 1, len(seen))
        return reference

    def search(self, reference: Reference) -> QuantizeReport:
        """Quantise everything, then less and less, until the gate holds or nothing is left."""
        everything = found = self._measure(self._layers, reference)
        chosen, lost = list(self._layers), dict[Layer, float]()
        holds = found.clear >= self._settings.min_agreement
        if self._settings.sensitivity or not holds:
            lost = self._measure_layers(reference.first(_PHOTOS_PER_LAYER))
        ranked = sorted(lost, key=lambda one: (-lost[one], -self._ranges[one].error))
        dropped = 1
        while found.clear < self._settings.min_agreement and dropped < len(ranked):
            chosen = [layer for layer in self._layers if layer not in ranked[:dropped]]
            found = self._measure(chosen, reference)
            dropped *= 2
        return QuantizeReport(
            precision=self._kind.name,
            spec=self._spec(chosen, found, reference),
            everything=everything.clear,
            layers=tuple(self._reports(chosen, lost)),
        )

    def write(self, out: Path, report: QuantizeReport) -> None:
        """Write the bundle whole or not at all."""
        chosen = [
            (graph, group)
            for graph, group in self._layers
            if report.spec.layers[graph][group.name] == self._kind.name
        ]
        overwrite = self._settings.overwrite
        with new_bundle_folder(out, overwrite=overwrite, verify=True) as folder:
            for entry in self._bundle.files():
                target = folder / entry.file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._bundle.open_path(entry), target)
            graphs = {name: dict(held) for name, held in self._bundle.graphs.items()}
            for name, model in self._graphs(chosen).items():
                entry = write_graph(model, name, folder, self._kind.name)
                graphs[name][self._kind.name] = entry
            made = {**self._bundle.quantization, self._kind.name: report.spec}
            new = replace(
                self._bundle, path=folder, name=out.stem, graphs=graphs, quantization=made
            )
            write_manifest(folder, new)

    def _graphs(self, chosen: Sequence[Layer]) -> dict[str, onnx.ModelProto]:
        half = FAMILIES[self._bundle.family].half_tensors
        return {
            name: quantised_graph(model, self._of(name, chosen), self._kind, half)
            for name, model in self._models.items()
        }

    def _of(self, name: str, chosen: Sequence[Layer]) -> dict[Group, Range]:
        """The chosen layers of one graph, and their ranges."""
        return {layer[1]: self._ranges[layer] for layer in chosen if layer[0] == name}

    def _measure(self, chosen: Sequence[Layer], reference: Reference) -> Agreement:
        self._tried += 1
        folder = self.folder / str(self._tried)
        if self._kind.name == "fp8":
            graphs = {
                name: emulated_graph(model, self._of(name, chosen), self._kind)
                for name, model in self._models.items()
            }
        else:
            graphs = self._graphs(chosen)
        made = candidate(self._bundle, folder, graphs, self._kind.name)
        try:
            return measure(made, "int8" if self._kind.name == "int8" else "float32", reference)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _measure_layers(self, reference: Reference) -> dict[Layer, float]:
        none, lost = self._measure([], reference), {}
        for place, layer in enumerate(self._layers):
            lost[layer] = none.clear - self._measure([layer], reference).clear
            self._advance("layers", place + 1, len(self._layers))
        return lost

    def _tapped(self, name: str) -> Any:
        """A session that also gives what every layer reads."""
        inferred = onnx.shape_inference.infer_shapes(self._models[name], strict_mode=True)
        wanted = {group.tensor for graph, group in self._layers if graph == name}
        wanted -= {value.name for value in (*inferred.graph.output, *inferred.graph.input)}
        for value in inferred.graph.value_info:
            if value.name in wanted:
                inferred.graph.output.append(value)
        del inferred.graph.value_info[:]
        path = self.folder / f"{name}.taps.onnx"
        onnx.save(inferred, path)
        backend = get_backend("openvino")
        return backend.load(
            path, device="cpu", precision="float32", options=BackendOptions()
        ).session()

    def _take_in(
        self, name: str, values: Mapping[str, Any], seen: dict[Layer, Seen], rng: Any
    ) -> None:
        for layer, one in seen.items():
            if layer[0] == name:
                one.add(np.asarray(values[layer[1].tensor]), convolves=layer[1].convolves, rng=rng)

    def _spec(
        self, chosen: Sequence[Layer], found: Agreement, reference: Reference
    ) -> QuantizationSpec:
        layers: dict[str, dict[str, str]] = {name: {} for name in self._models}
        for layer in self._layers:
            layers[layer[0]][layer[1].name] = self._kind.name if layer in chosen else "float16"
        return QuantizationSpec(
            agreement=found.clear,
            agreement_of_all=found.everywhere,
            min_agreement=self._settings.min_agreement,
            photos=(),
            measured_photos=len(reference.photos),
            classes=tuple(reference.vocabulary.names),
            layers=layers,
            seed=self._settings.seed,
        )

    def _reports(
        self, chosen: Sequence[Layer], lost: Mapping[Layer, float]
    ) -> Iterable[LayerReport]:
        for layer in self._layers:
            yield LayerReport(
                graph=layer[0],
                name=layer[1].name,
                count=len(layer[1].nodes),
                precision=self._kind.name if layer in chosen else "float16",
                method=self._ranges[layer].method,
                error=self._ranges[layer].error,
                lost=lost.get(layer),
            )


def _check_family(bundle: Bundle) -> None:
    if not FAMILIES[bundle.family].has_class_logits:
        known = ", ".join(name for name, spec in FAMILIES.items() if spec.has_class_logits)
        raise ArgumentError(
            f"bundle: expected one of family {known}, got {bundle.family}, whose agreement cannot "
            "be measured yet. Use float16."
        )


def _choose_photos(folder: Path, seed: int) -> tuple[list[Path], list[Path]]:
    """Pictures for ranges, and pictures that are held back to measure on."""
    found = find_photos([str(folder)])
    if len(found) < FEWEST_PHOTOS:
        raise ArgumentError(
            f"photos: expected at least {FEWEST_PHOTOS} pictures (64 are better), found "
            f"{len(found)} in {folder}. Add more."
        )
    order = np.random.default_rng(seed).permutation(len(found))[:MOST_PHOTOS]
    taken = [found[place] for place in order]
    frames = (read_photo(photo) for photo in taken)
    if all(frame.min() == frame.max() for frame in frames):
        raise ArgumentError(
            f"photos: expected pictures with content, got {len(taken)} of one colour each in "
            f"{folder}. Give pictures of what will be labelled."
        )
    measured = min(max(2, len(taken) // _HELD_BACK), _MOST_MEASURED)
    return taken[:-measured], taken[-measured:]
