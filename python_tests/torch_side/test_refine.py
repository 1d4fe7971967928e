"""Labels that follow the picture's edges: the law is the definition in NumPy."""

from pathlib import Path

import numpy as np
import pytest

from support.cells import CELLS, NAMES, ROWS, STATISTICS, STEP, bundle_at, picture
from support.errors import refused
from zsseg_rt import (
    ArgumentError,
    BackendError,
    ConfigError,
    Engine,
    EngineConfig,
    FrameMemory,
    ops,
)
from zsseg_rt.evaluation.engine_segmenter import EngineSegmenter
from zsseg_rt.ops import reference

STORED = Path(__file__).parents[1] / "bundles" / "v1"


@pytest.fixture(scope="module", params=[False, True], ids=["half_pixel", "corners"])
def bundle(request, tmp_path_factory):
    return bundle_at(tmp_path_factory.mktemp("refined"), corners=request.param)


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory):
    return bundle_at(tmp_path_factory.mktemp("plain"))


def engine_of(bundle, **settings):
    engine = Engine(bundle, EngineConfig(device="cpu", use_cache=False, **settings))
    engine.set_classes(NAMES)
    return engine


def label(bundle, frame, **settings):
    with engine_of(bundle, **settings) as engine:
        return engine.segment(frame)


def expected_labels(frame, align):
    """From the definition: cells, the finer grid, pixels."""
    corners = align == "corners"
    side = STEP * (CELLS - 1) + 1 if corners else STEP * CELLS
    image = reference.preprocess(frame, size_hw=(side, side), align=align, **STATISTICS)
    if corners:
        pool = image[:, ::STEP, ::STEP]
    else:
        pool = image.reshape(3, CELLS, STEP, CELLS, STEP).mean(axis=(2, 4))
    embeds = pool - image.mean(axis=(1, 2), keepdims=True)
    logits = (4 * np.einsum("cd,dyx->cyx", ROWS, embeds))[None].astype(np.float32)
    finer = 5 * (CELLS - 1) + 1 if corners else 5 * CELLS
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    guide = reference.preprocess(frame, size_hw=(finer, finer), align=align, **plain)
    logits = reference.bilateral_upsample(logits, guide[None], align=align)
    return reference.upsample_argmax(logits, frame.shape[:2], align=align)[0][0]


@pytest.mark.parametrize("frame_hw", [(40, 72), (97, 141), (11, 9)])
def test_labels_are_those_of_the_definition(bundle, frame_hw):
    frame = picture(*frame_hw)
    with engine_of(bundle, refine="bilateral") as engine:
        found = engine.segment(frame)
        expected = expected_labels(frame, engine.bundle.head.align)
    assert np.mean(found.labels == expected) > 0.999
    assert found.times["refine"] > 0
    if min(frame_hw) > 11:
        assert np.mean(label(bundle, frame).labels == expected) < 0.98


def test_labels_move_to_an_edge(plain_bundle):
    """Cells are 40 pixels wide; the edge is a fifth of one beyond where two of them meet."""
    frame = np.zeros((240, 240, 3), np.uint8)
    frame[:, :128], frame[:, 128:] = (230, 40, 40), (30, 60, 220)
    truth = np.where(np.arange(240) < 128, NAMES.index("red"), NAMES.index("blue"))
    wrong = {
        refine: np.mean(label(plain_bundle, frame, refine=refine).labels != truth)
        for refine in (None, "bilateral")
    }
    assert wrong["bilateral"] < 0.6 * wrong[None]
    assert wrong["bilateral"] < 0.015  # half a point of the finer grid


def test_one_colour_changes_nothing(plain_bundle, monkeypatch):
    """Whatever the network says of it."""
    logits = np.random.default_rng(0).standard_normal((1, 4, CELLS, CELLS)).astype(np.float32)
    monkeypatch.setattr(ops, "patch_text_similarity", lambda *_, **__: logits.reshape(1, 4, -1))
    frame = np.full((70, 90, 3), 77, np.uint8)
    plain, refined = (label(plain_bundle, frame, refine=r).labels for r in (None, "bilateral"))
    assert len(np.unique(plain)) == 4
    np.testing.assert_array_equal(refined, plain)


def test_what_is_not_finite_is_refused(plain_bundle, monkeypatch):
    logits = np.zeros((1, 4, CELLS * CELLS), np.float32)
    logits[0, 1, 7] = np.nan
    monkeypatch.setattr(ops, "patch_text_similarity", lambda *_, **__: logits)
    with refused(BackendError, "mask_logits"):
        label(plain_bundle, picture(40, 50), refine="bilateral")


@pytest.mark.parametrize("settings", [{"windows": "auto"}, {"resize": "letterbox"}])
def test_windows_are_refined_along_the_whole_frame(plain_bundle, settings):
    frame = np.zeros((120, 300, 3), np.uint8)
    frame[:, :171], frame[:, 171:] = (230, 40, 40), (30, 60, 220)
    truth = np.where(np.arange(300) < 171, NAMES.index("red"), NAMES.index("blue"))
    plain, refined = (
        np.mean(label(plain_bundle, frame, refine=refine, **settings).labels != truth)
        for refine in (None, "bilateral")
    )
    assert refined < plain
    square = picture(60, 60)
    np.testing.assert_array_equal(
        label(plain_bundle, square, refine="bilateral", **settings).labels,
        label(plain_bundle, square, refine="bilateral").labels,
    )


def test_scores_maps_memories_and_channel_orders(bundle):
    frame = picture(48, 85)
    settings = {"refine": "bilateral", "with_scores": True, "with_class_scores": "low"}
    with engine_of(bundle, **settings) as engine:
        alone, memory = engine.segment(frame), FrameMemory()
        for _ in range(3):
            steady = engine.segment(frame, memory=memory)
        assert engine.self_check().passed
    assert alone.class_scores.shape == (4, CELLS, CELLS)  # as without
    assert ((alone.scores > 0.2) & (alone.scores <= 1)).all()
    assert np.mean(steady.labels == alone.labels) > 0.99
    turned = np.ascontiguousarray(frame[..., ::-1])
    bgr = label(bundle, turned, channel_order="bgr", **settings)
    np.testing.assert_array_equal(bgr.labels, alone.labels)
    np.testing.assert_array_equal(bgr.scores, alone.scores)


def test_frames_in_two_planes(plain_bundle):
    luma = np.full((60, 80), 90, np.uint8)
    luma[:, 45:] = 180
    chroma = np.full((30, 40, 2), 128, np.uint8)
    rgb = reference.preprocess((luma, chroma), size_hw=(60, 80), mean=(0, 0, 0), std=(1, 1, 1))
    frame = np.ascontiguousarray(np.rint(255 * rgb).astype(np.uint8).transpose(1, 2, 0))
    with engine_of(plain_bundle, refine="bilateral") as engine:
        planes = engine.segment((luma, chroma)).labels
        assert np.mean(planes == engine.segment(frame).labels) > 0.999


def test_reports_say_what_was_asked_for(plain_bundle):
    settings = {"refine": "bilateral", "windows": "auto"}
    for given in (settings, {}):
        with engine_of(plain_bundle, **given) as engine:
            assert EngineSegmenter(engine, NAMES).describe()["settings"] == given


@pytest.mark.parametrize("refine", ["guided", "", True, 3])
def test_unknown_refinements_are_refused(refine):
    with refused(ConfigError, "refine"):
        EngineConfig(refine=refine)


@pytest.mark.parametrize("family", ["proposals", "segment_tokens", "aggregation"])
def test_other_families_are_refused(family):
    with refused(ArgumentError, "refine"):
        Engine(STORED / f"{family}.zsseg", EngineConfig(device="cpu", refine="bilateral"))
