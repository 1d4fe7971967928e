"""Compare a running engine with its bundle's golden sample: a frame and every intermediate.

Its file may come from strangers: what it declares is compared with limits before room is made for
it, and the arrays must fit each other, so that the self-check may compute with them.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import CompiledGraph
from zsseg_rt.bundles.bundle import MANIFEST, Bundle
from zsseg_rt.common.files import read_npy
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BackendError, BundleError, ShapeError, VocabularyError
from zsseg_rt.ops.reference import activate, upsample_bilinear
from zsseg_rt.runtime.families.base import Family, GoldenRule
from zsseg_rt.text.class_names import ClassList


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest accepted errors at one precision."""

    # Of what one graph makes of the golden sample's inputs, relative to the array's largest value;
    # 0 where graphs are compared otherwise
    graph: float = 0.0
    stage: float  # Of what the whole engine makes of the golden frame, likewise
    labels: float  # Share of different labels among pixels whose top-two margin exceeds stage


# float32: the same sums in another order, worst seen 6e-6 for a graph of twelve blocks at 512x512;
# float16: weights and activations rounded to 11 bits (relative 5e-4) through the same blocks, worst
# seen 4e-3; bfloat16: 8 bits, worst seen 1.1e-2 for such a graph.
TOLERANCES = {
    "float32": Tolerance(graph=1e-4, stage=1e-3, labels=1e-3),
    "bfloat16": Tolerance(graph=5e-2, stage=8e-2, labels=5e-3),
    "float16": Tolerance(graph=2e-2, stage=3e-2, labels=5e-3),
    # The least that stages may be off; see stage_tolerance. Of labels as clear as that, none
    # differed in INT8, in two trained and three random networks; 0.7 % in FP8, in a random CAT-Seg.
    "int8": Tolerance(stage=5e-2, labels=2e-2),
    "fp8": Tolerance(stage=1e-1, labels=2e-2),
}

Arrays = dict[str, npt.NDArray[Any]]
_log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 28  # of all arrays; by its shapes, ZegFormer with 1024 classes takes 94 MB
_MOST_ARRAYS = 64
_MOST_SCORES = 1 << 25  # classes times the frame's pixels: the self-check upsamples the logits
_SUFFIX = ".npy"
# What zipfile raises on damaged archives, and on those that it does not read.
_DAMAGE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
# What the self-check reads by name: kinds of dtype, and number of axes.
_NEEDED = {
    "frame": ("u", 3),
    "class_names": ("U", 1),
    "text_embeds": ("f", 2),
    "mask_logits": ("f", 4),
    "labels": ("u", 2),
}


@dataclass(frozen=True, kw_only=True)
class StageCheck:
    """One stage's verdict."""

    where: str = "runtime"  # What computed it: "runtime", or a graph and its precision
    stage: str  # Name in the golden sample
    # Largest absolute difference over the largest golden value; for labels the share of pixels with
    # a clear winner that differ
    error: float
    tolerance: float  # Largest accepted error

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


def check_against_golden(
    bundle: Bundle, family: Family, precision: str, run: Callable[..., Arrays]
) -> SelfCheck:
    """Run a golden frame, class names, embeddings and rule; compare all stages and labels."""
    golden, rule = read_golden(bundle, family), family.golden
    names = [str(name) for name in golden["class_names"]]
    prompts = [golden.get(text.golden, golden["text_embeds"]) for text in family.prompt_sets]
    embeds = np.stack(prompts) if len(prompts) > 1 else prompts[0]
    # Most samples were labelled without a threshold; the others show it.
    unknown = np.iinfo(golden["labels"].dtype).max
    threshold = bundle.head.unknown_below if (golden["labels"] == unknown).any() else None
    try:
        results = run(golden["frame"], names, embeds, replace(bundle.head, unknown_below=threshold))
    except (ShapeError, VocabularyError) as exc:
        raise BundleError(
            f"{bundle.path}: golden: expected classes and a frame that the bundle takes, got: {exc}"
        ) from exc
    tolerance = TOLERANCES.get(precision, TOLERANCES["float16"])
    stages = [
        StageCheck(
            stage=stage,
            error=scaled_error(results[stage], golden[stage]),
            tolerance=stage_tolerance(bundle, precision, stage, rule.slack.get(stage, 1.0)),
        )
        for stage in rule.stages
        if stage in golden and stage in results
    ]
    stages.append(
        StageCheck(
            stage="labels",
            error=_label_error(bundle, rule, golden, results["labels"], tolerance.stage),
            tolerance=tolerance.labels,
        )
    )
    return SelfCheck(precision=precision, stages=tuple(stages))


def prove_plans(
    bundle: Bundle,
    config: EngineConfig,
    graphs: Mapping[str, CompiledGraph],
    check: Callable[[], SelfCheck],
) -> None:
    """Compare graphs that a builder made with the bundle's golden sample, once per build."""
    built = [graph for graph in graphs.values() if graph.plan_name]
    if built and bundle.golden is None:
        _log.warning("%s: has no golden sample; its plans are unchecked", bundle.path)
    if not built or bundle.golden is None:
        return
    sample, fresh = bundle.golden.sha256, list[CompiledGraph]()
    for graph in built:
        verdict = graph.golden_verdict(sample)
        if verdict:
            raise _refusal([graph], verdict)
        if verdict is None:
            fresh.append(graph)
    stages = check().stages if fresh else ()
    if config.min_region_score is not None:  # which changes all but the graphs' own results
        stages = tuple(stage for stage in stages if any(_gives(one, stage) for one in built))
        fresh = [graph for graph in fresh if any(_gives(graph, stage) for stage in stages)]
    failure = next((stage for stage in stages if not stage.passed), None)
    if failure is None:
        for graph in fresh:
            graph.keep_golden_verdict(sample, "")
        return
    # A stage that no graph gives: any of the new ones may be to blame.
    blamed = [graph for graph in built if _gives(graph, failure)] or fresh
    problem = f"within {failure.tolerance:.2g} at {failure.stage}, got {failure.error:.2g}"
    for graph in blamed:
        graph.keep_golden_verdict(sample, problem)
    raise _refusal(blamed, problem)


def _gives(graph: CompiledGraph, stage: StageCheck) -> bool:
    return any(spec.name == stage.stage for spec in graph.outputs)


def _refusal(graphs: Sequence[CompiledGraph], problem: str) -> BackendError:
    names = ", ".join(graph.plan_name for graph in graphs)
    return BackendError(
        f"plan: expected the golden sample {problem} from {names}. Use precision='float32' or "
        "backend='torch'; to build it again, remove the file."
    )


def stage_tolerance(bundle: Bundle, precision: str, stage: str, slack: float = 1.0) -> float:
    """Largest accepted error of a stage."""
    # In 8 bits it depends on the network and on its golden frame, which may be noise: 0.2 % to 45 %
    # was seen. So it is twice what was measured when the bundle was made, for other processors
    # round differently between the layers; a network with one wrong scale is off by more. What was
    # not measured, such as the regions of a golden frame of noise, may be off by its largest value.
    usual = slack * TOLERANCES.get(precision, TOLERANCES["float16"]).stage
    quantization = bundle.quantization.get(precision)
    measured = 0.0 if quantization is None else quantization.golden.get(stage, 0.5)
    return max(usual, min(1.0, 2.0 * measured))


def scaled_error(result: npt.NDArray[Any], golden: npt.NDArray[Any]) -> float:
    """Largest absolute difference over the largest golden value; infinite if it has none."""
    if result.shape != golden.shape:
        return float("inf")
    scale = max(float(np.abs(golden).max(initial=0.0)), 1e-6)
    error = float(np.abs(result.astype(np.float64) - golden).max(initial=0.0)) / scale
    return error if np.isfinite(error) else float("inf")


def _label_error(
    bundle: Bundle,
    rule: GoldenRule,
    golden: Arrays,
    labels: npt.NDArray[Any],
    tolerance: float,
) -> float:
    """Share of pixels that differ among those whose winner is clear."""
    # It stays the winner whichever way every logit moves by the tolerance.
    logits = golden["mask_logits"].astype(np.float32)
    slack = np.float32(tolerance * np.abs(logits).max())
    maps = upsample_bilinear(logits, (labels.shape[0], labels.shape[1]), bundle.head.align)[0]
    bias = _seen_bias(bundle, rule, golden)
    activation = bundle.head.activation if bias.any() else "none"
    if activation == "softmax":  # is the sigmoid of its log-odds, which move twice as far
        maps, slack, activation = _log_odds(maps), 2 * slack, "sigmoid"
    winner = (activate(maps, activation) - bias).argmax(axis=0)[None]
    worst, rivals = (activate(maps + move, activation) - bias for move in (-slack, slack))
    np.put_along_axis(rivals, winner, -np.inf, axis=0)
    clear = np.take_along_axis(worst, winner, axis=0)[0] > rivals.max(axis=0)
    return float((labels[clear] != golden["labels"][clear]).mean()) if clear.any() else 0.0


def _seen_bias(bundle: Bundle, rule: GoldenRule, golden: Arrays) -> npt.NDArray[np.float32]:
    """The bias of seen classes after the activation [C, 1, 1]; 0 if the maps already include it."""
    count = golden["mask_logits"].shape[1]
    classes = ClassList.read([str(name) for name in golden["class_names"]])
    seen = classes.seen(bundle.head.seen)
    if not rule.raw_logits or seen is None:
        return np.zeros((count, 1, 1), np.float32)
    return (bundle.head.seen_bias * seen).astype(np.float32).reshape(count, 1, 1)


def _log_odds(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logarithm of p / (1 - p) of the softmax p over axis 0."""
    shares = np.exp(maps.astype(np.float64) - maps.max(axis=0))
    shares /= shares.sum(axis=0)
    shares = shares.clip(1e-30, 1.0 - 1e-15)
    return np.asarray(np.log(shares) - np.log1p(-shares), np.float32)


def read_golden(bundle: Bundle, family: Family) -> Arrays:
    """The arrays of a bundle's golden sample by name, at least those of ``_NEEDED``."""
    if bundle.golden is None:
        raise BundleError(
            f"{bundle.path / MANIFEST}: missing key 'golden'. Export the bundle again."
        )
    path = bundle.open_path(bundle.golden)
    try:
        golden = _read_arrays(path)
        _check_arrays(golden, family)
    except _DAMAGE as exc:
        raise BundleError(
            f"{path}: expected a golden sample, got {exc}. Export the bundle again."
        ) from exc
    return golden


def _read_arrays(path: Path) -> Arrays:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _check_entries(entries)
        return {
            entry.filename.removesuffix(_SUFFIX): read_npy(
                archive.read(entry), what=entry.filename, max_bytes=_MOST_BYTES
            )
            for entry in entries
        }


def _check_entries(entries: list[zipfile.ZipInfo]) -> None:
    """Refuse an archive by its table of contents, which also bounds what is read of each entry."""
    names = [entry.filename for entry in entries]
    if len(names) > _MOST_ARRAYS or len(set(names)) < len(names):
        raise ValueError(
            f"{len(names)} arrays, where at most {_MOST_ARRAYS} with distinct names may be"
        )
    for entry in entries:
        if not entry.filename.endswith(_SUFFIX):
            raise ValueError(f"{entry.filename!r}, which is not a .npy array")
    total = sum(entry.file_size for entry in entries)
    if total > _MOST_BYTES:
        raise ValueError(f"{total} bytes of arrays, where at most {_MOST_BYTES} may be")


def _check_arrays(golden: Arrays, family: Family) -> None:
    """Refuse arrays that are missing, or do not fit each other."""
    for name, (kind, axes) in _NEEDED.items():
        if name not in golden:
            raise ValueError(f"no array {name!r}")
        array = golden[name]
        if array.dtype.kind != kind or array.ndim != axes or not array.size:
            raise ValueError(f"{name}: {array.dtype} {list(array.shape)}")
    for name, array in golden.items():
        if array.dtype.kind not in "biuf" and name != "class_names":
            raise ValueError(f"{name}: {array.dtype}")
    frame, logits, labels = golden["frame"], golden["mask_logits"], golden["labels"]
    num_classes, embeds = len(golden["class_names"]), golden["text_embeds"]
    sets = [golden.get(text.golden, embeds).shape for text in family.prompt_sets]
    if frame.dtype != np.uint8 or frame.shape[2] != 3 or labels.shape != frame.shape[:2]:
        raise ValueError(f"a frame {list(frame.shape)} and labels {list(labels.shape)}")
    if len(embeds) != num_classes or any(shape != embeds.shape for shape in sets):
        raise ValueError(f"{num_classes} class_names and text_embeds {list(embeds.shape)}")
    if logits.shape[0] != 1 or (family.golden.raw_logits and logits.shape[1] != num_classes):
        raise ValueError(f"{num_classes} class_names and mask_logits {list(logits.shape)}")
    if logits.shape[1] * labels.size > _MOST_SCORES:
        raise ValueError(f"mask_logits {list(logits.shape)} for {labels.size} pixels")
