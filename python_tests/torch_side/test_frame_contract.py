"""Every kind of frame, by every family, on every place: results of its RGB pixels, unrecorded.

Of two things that do not meet in the code, not every pair is tried: an emulated GPU takes long.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import count_captures
from support.device_backend import device_backend
from support.frame_kinds import (
    KINDS,
    ON_THE_HOST,
    STORED,
    assert_same,
    compared,
    frame,
    half_bundle,
    label,
    open_engine,
    vocabulary,
)
from support.host_backend import host_backend
from zsseg_rt import Bundle, FrameMemory
from zsseg_rt.runtime import captures

# In how many parts a frame is recorded: the host looks at something before each but the first.
PARTS = {"descriptor": 1, "dense": 1, "segment_tokens": 1, "aggregation": 2, "proposals": 3}
HALVES = ("descriptor in half", "clip_rc in half")


# --- what a case does -----------------------------------------------------------------------------


def words(count, **settings):
    return lambda engine: vocabulary(engine, count, **settings)


def frames(count=4, kind="RGB", **settings):
    def run(engine, as_pixels):
        return [label(engine, kind, n, as_pixels=as_pixels, **settings) for n in range(count)]

    return run


def overlays(kind):
    """Drawn with two opacities, and between them a frame that is not drawn on."""

    def run(engine, as_pixels):
        alphas = enumerate([0.3, 0.3, None, 0.8, 0.3])
        return [label(engine, kind, n, as_pixels=as_pixels, alpha=alpha) for n, alpha in alphas]

    return run


def kinds_in_turns(engine, as_pixels):
    kinds = ("planes", "planes on the GPU", "planes fetched from the GPU")
    return [label(engine, kind, n, as_pixels=as_pixels) for n in range(3) for kind in kinds]


def shapes_and_rules(engine, as_pixels):
    kinds = [((31, 47), {}), ((20, 90), {}), ((31, 47), {"unknown_below": 0.6})]
    turns = 1 if as_pixels else 3
    results = [label(engine, "RGB", 3, size=size, **rule) for size, rule in kinds * turns]
    return results * (3 // turns)


def checks_in_turns(engine, as_pixels):
    """The golden sample has classes of its own, in the same buffers."""
    results = []
    for seed in range(4):
        results.append(label(engine, "RGB", seed))
        if not as_pixels:
            engine.self_check()
    return results


def in_lanes(engine, as_pixels):
    with engine.lane() as lane:
        return [compared(each.segment(frame(n))) for n in range(4) for each in (engine, lane)]


def with_memories(**settings):
    """A pan that two sources see, in turns."""

    def run(engine, as_pixels):
        pytest.importorskip("cv2")
        scene = np.kron(frame(1, 8, 12), np.ones((6, 6, 1), np.uint8))  # 48x72 pixels
        memories, at = [FrameMemory(**settings) for _ in range(2)], itertools.count()
        return [
            compared(engine.segment(np.ascontiguousarray(scene[:31, x : x + 47]), memory=memory,
                                captured_at=float(next(at))))
            for x in range(0, 20, 4) for memory in memories
        ]  # fmt: skip

    return run


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Steps of one engine, and how often it records and at least launches captures."""

    bundle: str
    steps: list[tuple[Callable[..., Any], Callable[..., Any]]]
    recorded: int | None = None
    launched: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    most_captures: int | None = None
    is_varied: bool = True


SWAPS = [
    words(7), words(5, seed=1), words(6, seed=2, synonyms=True), words(4, seed=3, background=3),
    words(12, seed=4), words(300, seed=5, synonyms=True), words(7),
]  # fmt: skip
# A capture has rows for 8, 16, 32 or more names; labels of 300 take two bytes. With more names than
# 8 the host chooses for aggregation; with fewer, its stand-in's numbers change with the rows that
# fill a capture.
COUNTS = dict.fromkeys(PARTS, (5, 300)) | {"descriptor": (1, 8, 23, 300), "aggregation": (8,)}
IN_RGB = ("RGB of another library", "pitched planes on the GPU")
STEADY, STILL = {"steady": True}, {"steady": False, "skip_still": True}


def cases():
    for bundle, parts in PARTS.items():
        for count in COUNTS[bundle]:
            steps = [(words(count), frames())]
            yield f"{count} names", Case(bundle, steps, parts, 3 * parts, is_varied=count > 1)
        alone = bundle == "aggregation"
        swaps = [words(8), words(8, seed=1), words(8)] if alone else SWAPS
        # buffers of classes keep their addresses: classes of one size are recorded once
        recorded = parts if alone else None
        yield "swaps", Case(bundle, [(swap, frames(2)) for swap in swaps], recorded, 3)
        runs = {"shapes and rules": shapes_and_rules, "overlays": overlays("RGB on the GPU")}
        if not alone:  # a stand-in's weights are of the sizes it has seen, the golden's too
            runs["self-check in turns"] = checks_in_turns
        if bundle in ("descriptor", "segment_tokens"):
            runs["overlays on planes"] = overlays("planes on the GPU")
        for name, run in runs.items():
            yield name, Case(bundle, [(words(8), run)], None, 2)
    for kind in KINDS:
        if KINDS[kind].is_labelled_on_device:
            order = "rgb" if kind in IN_RGB else "bgr"
            case = Case("descriptor", [(words(5), overlays(kind))], None, 2)
            case.settings["channel_order"] = order
            yield f"overlays on {kind} in {order}", case
        else:
            yield kind, Case("descriptor", [(words(5), frames(3, kind))])
    # all of a frame, or all up to its logits
    for bundle, rule in (("descriptor", STEADY), ("dense", STILL)):
        run = with_memories(**rule)
        yield "memory", Case(bundle, [(words(5), run), (words(5, seed=1), run)], 1, 15)
    for bundle, count in (("descriptor", 5), ("dense", 23)):
        yield "windows", Case(bundle, [(words(6), frames(3, size=(31, 75)))], 2, 4,
                              {"windows": "auto"})  # fmt: skip
        scored = {"with_class_scores": "low"}
        yield f"scores of {count}", Case(bundle, [(words(count), frames())], 1, 3, scored)
    for bundle in ("dense", "aggregation"):
        few = {"max_candidates": 2}
        yield "few candidates", Case(bundle, [(words(8), frames())], None, 0, few)
    for bundle in HALVES:
        swaps = [(words(n, seed=n), frames(3)) for n in (23, 7, 6)]
        yield "swaps", Case(bundle, swaps, None, 4, {"precision": "auto"})
    for bundle in ("segment_tokens", "proposals"):
        case = Case(bundle, [(words(9), frames())], PARTS[bundle], backend={"foreign": True})
        yield "arrays of another library", case
    yield "9 names", Case("aggregation", [(words(9), frames())], 1, 3)
    for kind in ("RGB on the GPU", "planes on the GPU"):  # classes on the host are drawn there
        steps = [(words(6, synonyms=True), overlays(kind))]
        yield f"synonyms on {kind}", Case("segment_tokens", steps, backend={"foreign": True})
    yield "kinds in turns", Case("descriptor", [(words(5), kinds_in_turns)], 1, 7)
    parts = Case("proposals", [(words(9), frames(3))], most_captures=2)
    yield "more parts than are kept", parts
    yield "lanes", Case("descriptor", [(words(9), in_lanes)], 2, 6, {"num_lanes": 2})
    for score in (0.9, 1.0):  # few regions are shown, and none
        shown = {"min_region_score": score}
        yield f"regions from {score}", Case("proposals", [(words(9), frames())], None, 5, shown)


# On an emulated GPU a frame of proposals takes ten times as long as one of another family.
SLOW = ("300 names", "swaps", "overlays", "arrays of another library", "regions from 1.0")


def parameters():
    for name, case in cases():
        slow = case.bundle == "proposals" and name in SLOW
        marks = [pytest.mark.nightly] if slow else []
        yield pytest.param(case, id=f"{case.bundle}: {name}", marks=marks)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("case", [*parameters()])
def test_recorded_frames_equal_plain_ones_of_their_pixels(monkeypatch, tmp_path, case):
    require_cuda()
    bundle, counts = case.bundle, count_captures(monkeypatch)
    if bundle in HALVES:
        bundle = half_bundle(bundle.partition(" ")[0], tmp_path)
    if case.most_captures:
        monkeypatch.setattr(captures, "MOST_CAPTURES", case.most_captures)
    placed, _ = device_backend(monkeypatch, **case.backend)
    with open_engine(bundle, placed, **case.settings) as engine:
        runs = []
        for choose, run in case.steps:
            engine.set_classes(**choose(engine))
            runs.append(run(engine, False))
    assert case.recorded in (None, counts["recorded"])
    assert counts["launched"] >= case.launched
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    before = dict(counts)
    for (choose, run), results in zip(case.steps, runs, strict=True):
        with open_engine(bundle, placed, **case.settings) as fresh:
            fresh.set_classes(**choose(fresh))
            for one, other in zip(results, run(fresh, True), strict=True):
                assert_same(one, other)
    assert counts == before
    distinct = {result["scores"].tobytes() for step in runs for result in step}
    assert len(distinct) > 1 or not case.is_varied


# --- graphs that the host computes ----------------------------------------------------------------

GIVEN = ("RGB", "planes", "RGB on the GPU", "planes on the GPU")
COMPUTED = [
    *(("descriptor", kind, {}) for kind in ("own arrays", "foreign arrays", "TensorRT's")),
    *((family, "own arrays", {}) for family in ("dense", "aggregation", "proposals")),
    ("segment_tokens", "foreign arrays", {}),
    ("descriptor", "own arrays", {"unknown_below": 0.5, "channel_order": "bgr"}),
    pytest.param("proposals", "TensorRT's", {"min_region_score": 0.3}, marks=pytest.mark.nightly),
]


@pytest.mark.needs_cuda
@pytest.mark.parametrize(("bundle", "session_kind", "settings"), COMPUTED)
def test_labels_on_a_gpu_are_the_cpu_s(monkeypatch, bundle, session_kind, settings):
    """Frames of every place and of two sizes, and two sets of classes, interleaved."""
    require_cuda()
    names = list(Bundle.load(STORED / f"{bundle}.zsseg").text_bank.names)[:5]
    gpu, results = host_backend(monkeypatch, session_kind), []
    for device, placed in (("cpu", {"device": "cpu"}), ("cuda:0", gpu)):
        with open_engine(bundle, placed, **settings) as engine:
            assert engine.device == device
            for classes, kind in itertools.product((names, names[:2]), GIVEN):
                engine.set_classes(classes)
                size = ((80, 76), (60, 14))[(GIVEN.index(kind) + len(classes)) % 2]
                results.append(label(engine, kind, 5, as_pixels=device == "cpu", size=size))
            assert engine.self_check().passed
    half = len(results) // 2
    for cpu, gpu in zip(results[:half], results[half:], strict=True):
        same = gpu["labels"] == cpu["labels"]
        assert gpu["labels"].dtype == cpu["labels"].dtype
        assert same.mean() > 0.995
        np.testing.assert_allclose(gpu["scores"][same], cpu["scores"][same], atol=2e-4)
        assert gpu["stages"] | {"check"} == cpu["stages"] | {"check"}  # part of another kernel


# --- without a GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bundle", "order"),
    [("descriptor", "rgb"), ("descriptor", "bgr"), ("dense", "bgr"), ("segment_tokens", "rgb")],
)
def test_frames_on_the_cpu_have_the_labels_of_their_pixels(bundle, order):
    with open_engine(bundle, {"device": "cpu"}, channel_order=order) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        results = {kind: label(engine, kind, 1) for kind in ON_THE_HOST}
        for kind, result in results.items():
            assert_same(result, label(engine, kind, 1, as_pixels=True))
        hd, usual = (results[kind]["scores"] for kind in ("planes of HD", "planes"))
        assert not np.array_equal(hd, usual)
