"""Golden samples: what they hold, and a bundle compared with its own, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import NARROW, HeadSpec, PreprocessSpec
from zsseg_rt.common.arrays import HALF_PRECISIONS
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import BundleError
from zsseg_rt.onnx.arrays import run_network
from zsseg_rt.onnx.reader import map_file, read_network
from zsseg_rt.ops import reference
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.self_check import (
    TOLERANCES,
    SelfCheck,
    StageCheck,
    read_golden,
    scaled_error,
    stage_tolerance,
)
from zsseg_rt.text.embeddings import unit_rows

FRAME_HW = (120, 160)
GOLDEN_NAMES = ("road", "person", "car", "tree", "sky")
_MOST_NAMES = 16


def golden_names(class_names: Sequence[str] | None) -> list[str]:
    """The names of a golden sample: the first few of those given, which show as much as all."""
    return list(class_names or GOLDEN_NAMES)[:_MOST_NAMES]


def golden_frame() -> npt.NDArray[np.uint8]:
    """A frame with edges, gradients and noise, uint8 [120, 160, 3]; always the same."""
    rng = np.random.default_rng(20230618)
    rows, columns = np.mgrid[0 : FRAME_HW[0], 0 : FRAME_HW[1]]
    shades = np.stack([rows * 2, columns, 255 - rows - columns // 2], axis=-1) % 256
    blocks = rng.integers(0, 256, (6, 8, 3)).repeat(20, axis=0).repeat(20, axis=1)
    noise = rng.integers(-12, 13, (*FRAME_HW, 3))
    return np.clip(0.5 * shades + 0.5 * blocks + noise, 0, 255).astype(np.uint8)


def random_rows(count: int, width: int) -> npt.NDArray[np.float32]:
    """Random unit vectors that stand for class embeddings, float32 [count, width]."""
    return unit_rows(np.random.default_rng(count).standard_normal((count, width), np.float32))


def preprocess_frame(spec: PreprocessSpec, align: str = "half_pixel") -> npt.NDArray[np.float32]:
    """The golden frame as the encoder's input, float32 [1, 3, h, w]."""
    frame, size_hw = golden_frame(), spec.size_hw
    image = reference.preprocess(frame, size_hw=size_hw, mean=spec.mean, std=spec.std, align=align)
    return np.ascontiguousarray(image[None], np.float32)


def labels_golden(
    patches: npt.NDArray[np.float32],
    classes: npt.NDArray[np.float32],
    head: HeadSpec,
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """Masks and labels of patches [1, N, E] and classes [C, E] or [1, C, E]; frame and names."""
    frame = golden_frame()
    logits = reference.patch_text_similarity(
        patches, classes, logit_scale=head.logit_scale, normalize=head.normalize
    ).reshape(1, len(names), *head.grid_hw)
    labels, scores = reference.upsample_argmax(
        logits,
        frame.shape[:2],
        activation=head.activation,
        seen=np.isin(list(names), head.seen) if head.seen else None,
        seen_bias=head.seen_bias,
        with_scores=True,
        align=head.align,
    )
    assert scores is not None
    return {
        "frame": frame,
        "class_names": np.array(list(names)),
        "mask_logits": logits,
        "labels": labels[0],
        "scores": scores[0],
    }


# --- a bundle compared with its sample ---

Arrays = Mapping[str, npt.NDArray[Any]]
_COMPARISONS = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "TopK"}


def require_passed(check: SelfCheck, bundle: str) -> None:
    """Refuse a bundle that left its golden sample in a stage."""
    if stage := check.first_failure:
        raise BundleError(
            f"{bundle}: {stage.where}: {stage.stage}: expected within {stage.tolerance:g} of the "
            f"model, got {stage.error:.3g}. The bundle was not written; check the model's weights, "
            "or leave this precision out."
        )


def verify_bundle(path: Path) -> SelfCheck:
    """Run the engine, and every graph that it leaves out or that is off, on the golden sample.

    A graph alone is fed the golden sample's own inputs, so an error is reported where it arises.
    Graphs run in float32, on OpenVINO or in NumPy: a float16 graph then shows the error of its
    weights and its structure; errors from a GPU's arithmetic are left to ``Engine.self_check`` on
    that GPU.

    Args:
        path: Bundle folder.

    Raises:
        BundleError: The bundle cannot be read, or has no golden sample, or a damaged one.
        BackendError: A graph cannot be run.
    """
    bundle = Bundle.load(path)
    golden = read_golden(bundle, create_family(bundle, EngineConfig()))
    precision = "float32" if "float32" in bundle.graphs["image_encoder"] else "auto"
    config = EngineConfig(device="cpu", backend="openvino", precision=precision, use_cache=False)
    with Engine(bundle, config) as running:
        check = running.self_check()
    stages = [
        stage
        for name, variants in bundle.graphs.items()
        for precision, entry in variants.items()
        # no CPU computes FP8; what it loses is measured when it is written
        if precision != "fp8" and all(spec.name in golden for spec in entry.inputs)
        for stage in _one_graph(bundle, (name, precision), golden, check.stages)
    ]
    return replace(check, stages=(*stages, *check.stages))


def _one_graph(
    bundle: Bundle, key: tuple[str, str], golden: Arrays, engine: Iterable[StageCheck]
) -> list[StageCheck]:
    name, precision = key
    entry = bundle.graphs[name][precision]
    path = bundle.path / entry.file
    stages = {
        spec.name: "prompt_embeds" if spec.name == "text_embeds" else spec.name
        for spec in entry.outputs
    }
    runs_it = precision == "float32" and precision in bundle.graphs["image_encoder"]
    errors = {check.stage: check.error for check in engine if runs_it}
    most = TOLERANCES[precision].graph
    if any(errors.get(stage, np.inf) > most for stage in stages.values()):
        feeds = {spec.name: np.ascontiguousarray(golden[spec.name]) for spec in entry.inputs}
        results, most = _results(path, precision, feeds), most * _slack(path, precision)
        errors = {
            stage: scaled_error(results[name], golden[stage]) for name, stage in stages.items()
        }
    return [
        StageCheck(
            where=f"{name} {precision}",
            stage=stage,
            error=errors[stage],
            tolerance=stage_tolerance(bundle, precision, stage) if precision in NARROW else most,
        )
        for stage in stages.values()
    ]


def _slack(path: Path, precision: str) -> float:
    """More for a graph that compares what it computes: of SC-CLIP's 784 patches, 2 were ties."""
    nodes = read_network(map_file(path)).nodes if precision == "float32" else ()
    return 10.0 if any(node.kind in _COMPARISONS for node in nodes) else 1.0


def _results(path: Path, precision: str, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Outputs by name; of halves by NumPy, since OpenVINO would hold them three times."""
    if precision in HALF_PRECISIONS:
        return run_network(read_network(map_file(path)), feeds)
    computed = "int8" if precision == "int8" else "float32"
    graph = get_backend("openvino").load(
        path, device="cpu", precision=computed, options=BackendOptions()
    )
    session = graph.session()
    try:
        return {name: np.array(array) for name, array in session.run(feeds).items()}
    finally:
        session.close()
        graph.close()
