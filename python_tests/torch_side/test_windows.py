"""Windows and letterboxes keep a frame's shape: the law is their definition in NumPy."""

import shutil

import cv2
import numpy as np
import pytest

from support.cells import CELLS, NAMES, ROWS, STATISTICS, STEP, bundle_at, image
from support.errors import refused
from support.fakes import edit_manifest
from zsseg_rt import BundleError, ConfigError, Engine, EngineConfig, FrameError, FrameMemory
from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.ops import reference
from zsseg_rt.runtime import frames as window_plan
from zsseg_rt.runtime.frames import Windows


@pytest.fixture(scope="module", params=[False, True], ids=["half_pixel", "corners"])
def bundle(request, tmp_path_factory):
    return bundle_at(tmp_path_factory.mktemp("windows"), corners=request.param)


@pytest.fixture(scope="module")
def plain_bundle(tmp_path_factory):
    return bundle_at(tmp_path_factory.mktemp("plain"))


def expected_labels(frame, starts, cells, align):
    """From the definition, window by window."""
    side = STEP * (CELLS - 1) + 1 if align == "corners" else STEP * CELLS
    whole = [(n - 1) * STEP + 1 if align == "corners" else n * STEP for n in cells]
    planes = reference.preprocess(frame, size_hw=tuple(whole), align=align, **STATISTICS)
    total, counts = np.zeros((1, 4, *cells)), np.zeros(cells)
    for top in starts[0]:
        for left in starts[1]:
            y, x = top * STEP, left * STEP
            image = planes[:, y : y + side, x : x + side]
            if align == "corners":
                pool = image[:, ::STEP, ::STEP]
            else:
                pool = image.reshape(3, CELLS, STEP, CELLS, STEP).mean(axis=(2, 4))
            embeds = pool - image.mean(axis=(1, 2), keepdims=True)
            part = (slice(top, top + CELLS), slice(left, left + CELLS))
            total[(0, slice(None), *part)] += 4 * np.einsum("cd,dyx->cyx", ROWS, embeds)
            counts[part] += 1
    logits = (total / counts).astype(np.float32)
    return reference.upsample_argmax(logits, frame.shape[:2], align=align)[0][0]


def label(bundle, frame, **settings):
    config = EngineConfig(**{"max_windows": 1000, **settings}, device="cpu", use_cache=False)
    with Engine(bundle, config) as engine:
        engine.set_classes(NAMES)
        return engine.segment(frame, memory=settings.get("memory"))


@pytest.mark.parametrize("frame_hw", [(40, 72), (97, 41)])
def test_windows_are_the_mean_of_their_logits(bundle, frame_hw):
    frame = image(*frame_hw)
    with Engine(bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        side, align = engine.bundle.preprocess.size_hw[0], engine.bundle.head.align
    seg = label(bundle, frame, windows=f"{side}x{side}+12")
    less = 1 if align == "corners" else 0
    cells = [int((n - less) / STEP + 0.5) + less for n in frame_hw]
    starts = [sorted({min(3 * i, n - CELLS) for i in range(n)}) for n in cells]
    expected = expected_labels(frame, starts, cells, align)
    assert np.mean(seg.labels == expected) > 0.999
    assert len(np.unique(expected)) > 2
    assert np.mean(label(bundle, frame).labels == expected) < 0.98


@pytest.mark.parametrize(
    ("frame_hw", "cells", "starts"),
    [
        ((24, 24), (6, 6), ([0], [0])),
        ((48, 85), (6, 11), ([0], [0, 3, 5])),
        ((54, 36), (9, 6), ([0, 3], [0])),
    ],
)
def test_auto_fits_the_shorter_side(plain_bundle, frame_hw, cells, starts):
    frame = image(*frame_hw)
    seg = label(plain_bundle, frame, windows="auto")
    expected = expected_labels(frame, starts, cells, "half_pixel")
    assert np.mean(seg.labels == expected) > 0.999


def test_one_window_of_the_frames_shape_is_the_stretched_frame(plain_bundle):
    frame = image(60, 60)
    for settings in ({"windows": "auto"}, {"resize": "letterbox"}, {"resize": "stretch"}):
        np.testing.assert_array_equal(
            label(plain_bundle, frame, **settings).labels, label(plain_bundle, frame).labels
        )


def test_a_letterbox_labels_the_frame_alone(plain_bundle):
    """Its shape is kept: a picture's labels are those of a square that it is the upper part of."""
    frame = image(48, 96)
    square = np.concatenate([frame, frame[-1:].repeat(48, 0)])
    labels = label(plain_bundle, frame, resize="letterbox").labels
    expected = label(plain_bundle, square).labels[:48]
    assert labels.shape == (48, 96)
    assert np.mean(labels[:40] == expected[:40]) > 0.999


def test_steady_labels_scores_and_maps_as_without(plain_bundle):
    frame = image(48, 85)
    config = EngineConfig(device="cpu", with_class_scores="low", windows="auto", with_scores=True)
    with Engine(plain_bundle, config) as engine:
        engine.set_classes(NAMES)
        alone, memory = engine.segment(frame), FrameMemory()
        for _ in range(3):
            steady = engine.segment(frame, memory=memory)
        assert engine.self_check().passed
    assert alone.class_scores.shape == (4, 6, 11)
    assert alone.times["image_encoder"] > 0
    np.testing.assert_allclose(alone.class_scores.sum(axis=0), 1, rtol=1e-5)
    assert np.mean(steady.labels == alone.labels) > 0.99


def test_unusable_windows_are_refused(plain_bundle):
    for windows in ("8x8+4", "24x24+5", "24x24+0", "24x24+28", "24x24", "autos", "", "x+", 3):
        with refused(ConfigError, "windows"):
            Engine(plain_bundle, EngineConfig(device="cpu", windows=windows))
    with refused(ConfigError, "resize"):
        EngineConfig(windows="auto", resize="letterbox")
    # whose cells lie between pixels
    preprocess = PreprocessSpec(size_hw=(10, 10), mean=(0.0,) * 3, std=(1.0,) * 3)
    head = HeadSpec(logit_scale=1.0, normalize=True, activation="none", grid_hw=(3, 3))
    with refused(ConfigError, "windows"):
        Windows.of(preprocess, head, EngineConfig(windows="auto"))


def test_frames_that_do_not_suit_are_refused(plain_bundle):
    with Engine(plain_bundle, EngineConfig(device="cpu", windows="24x24+4")) as engine:
        engine.set_classes(NAMES)
        for frame_hw in ((23, 60), (60, 23)):
            with refused(FrameError, "frame"):
                engine.segment(np.zeros((*frame_hw, 3), np.uint8))
        assert engine.segment(image(24, 30)).labels.shape == (24, 30)


def test_a_bundle_may_ask_for_windows(plain_bundle, tmp_path):
    asking, frame = shutil.copytree(plain_bundle, tmp_path / "asking.zsseg"), image(48, 85)
    edit_manifest(asking, ("preprocess", "resize"), "windows")
    for settings, usual in (({}, {"windows": "auto"}), ({"resize": "stretch"}, {})):
        seg, expected = label(asking, frame, **settings), label(plain_bundle, frame, **usual)
        np.testing.assert_array_equal(seg.labels, expected.labels)
    edit_manifest(asking, ("preprocess", "resize"), "crop")
    with refused(BundleError, None, "preprocess", "resize"):
        label(asking, frame)


@pytest.mark.parametrize("frame_hw", [(5, 999), (999, 5), (24, 400), (1, 32767), (32767, 1)])
def test_a_frame_of_too_many_windows_keeps_its_shape_in_one(plain_bundle, caplog, frame_hw):
    window_plan._remark_on_letterboxes.cache_clear()
    frame = image(*frame_hw)
    maps = [label(plain_bundle, frame, windows="auto", max_windows=16).labels for _ in range(2)]
    np.testing.assert_array_equal(maps[0], label(plain_bundle, frame, resize="letterbox").labels)
    assert maps[1].shape == frame_hw
    assert len([text for text in caplog.messages if "more than 16 windows" in text]) == 1


@pytest.mark.parametrize("settings", [{"windows": "24x24+12"}, {"windows": "auto"}, {}])
def test_a_source_whose_frames_do_not_fit_is_lost_alone(plain_bundle, tmp_path, settings):
    """Whatever a camera's sides, the other one goes on; and the message names no option."""
    folders = [str(tmp_path / str(number)) for number in range(5)]
    for number, frame_hw in enumerate([(20, 4000), (48, 48), (4000, 20), (1, 1), (30, 23)]):
        (tmp_path / str(number)).mkdir()
        for index in range(2):
            cv2.imwrite(f"{folders[number]}/{index}.png", image(*frame_hw))
    with Engine(plain_bundle, EngineConfig(device="cpu", **settings)) as engine:
        engine.set_classes(NAMES)
        with engine.stream(folders) as stream:
            sources = [seg.frame.source for seg in stream]
            stats = stream.stats()
    assert sources.count(folders[1]) == 2
    fits = settings.get("windows") != "24x24+12"
    assert all((stats[one].error is None) == fits for one in (folders[0], *folders[2:]))
    assert "windows" not in " ".join(filter(None, (one.error for one in stats.values())))
