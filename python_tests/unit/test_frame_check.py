"""A frame that cannot be taken is refused with the call that mends it, and that call does."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig, ShapeError, ZssegError, read_photo
from zsseg_rt.demo import demo_classes, demo_photos
from zsseg_rt.errors import DTypeError, EngineStateError

FRAME = read_photo(demo_photos("scenes")[0])


@pytest.fixture(scope="module")
def engine():
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu", use_cache=False)) as engine:
        engine.set_classes(["red ball", "grey wall", "blue sky"])
        yield engine


# An object of PIL's, where Pillow may be absent.
PIL_IMAGE = type("Image", (), {"__module__": "PIL.Image", "convert": lambda self, mode: FRAME})()
GREY = np.repeat(FRAME[..., :1], 3, axis=2)
# What is given, words of the message, the call that the message names, and its frame.
MENDED = [
    (demo_photos("scenes")[0], "read_photo(path)", read_photo),
    (Path(demo_photos("scenes")[0]), "the path '", read_photo),
    (PIL_IMAGE, 'np.array(image.convert("RGB"))', lambda f: np.array(f.convert("RGB"))),
    (FRAME.tolist(), "np.asarray(...)", lambda f: np.asarray(f, np.uint8)),
    (FRAME.repeat(2, 1)[:, ::2], "np.ascontiguousarray(frame)", np.ascontiguousarray),
    (FRAME / np.float32(255), "(frame * 255)", lambda f: (f * 255).round().astype(np.uint8)),
    (FRAME.astype(np.float64), ".clip(0, 255)",
     lambda f: f.round().clip(0, 255).astype(np.uint8)),
    (FRAME.astype(np.uint16) * 257, "(frame >> 8)", lambda f: (f >> 8).astype(np.uint8)),
    (FRAME.astype(np.int64), "frame.astype(np.uint8)", lambda f: f.astype(np.uint8)),
    (np.dstack([FRAME, FRAME[..., 0]]), "frame[..., :3]",
     lambda f: np.ascontiguousarray(f[..., :3])),
    (np.ascontiguousarray(FRAME.transpose(2, 0, 1)), "frame.transpose(1, 2, 0)",
     lambda f: np.ascontiguousarray(f.transpose(1, 2, 0))),
    (FRAME[..., 0].copy(), "COLOR_GRAY2RGB", lambda f: cv2.cvtColor(f, cv2.COLOR_GRAY2RGB), GREY),
    (FRAME[..., :1].copy(), "np.repeat(frame, 3", lambda f: np.repeat(f, 3, axis=2), GREY),
]  # fmt: skip


@pytest.mark.parametrize("row", MENDED, ids=lambda row: row[1])
def test_the_named_call_mends_the_frame(engine, row):
    frame, words, mend, *mended = row
    with pytest.raises(ZssegError) as caught:
        engine.segment(frame)
    assert words in str(caught.value)
    assert str(caught.value).startswith("frame: expected ")
    expected = mended[0] if mended else FRAME
    np.testing.assert_array_equal(mend(frame), expected)
    labels = engine.segment(mend(frame)).labels
    np.testing.assert_array_equal(labels, engine.segment(expected).labels)


def test_seen_names_are_matched_as_the_tokenizer_reads_them(engine):
    maps = []
    for name in ("blue sky", "Blue sky", "blue  sky", "\ufeffblue sky"):
        engine.set_classes([name, "yellow sand"])
        maps.append(engine.segment(FRAME).labels)
    assert all((labels == maps[0]).all() for labels in maps)


def test_frames_of_odd_kinds_are_refused(engine, tmp_path):
    with refused(ZssegError, "frame", "cv2.imread"):
        engine.segment(cv2.imread(str(tmp_path / "gone.png")))
    with refused(ZssegError, "frame", "tensor.cpu"):
        engine.segment(type("Tensor", (), {"__module__": "torch"})())
    for kind in ("M8[s]", "m8[s]", "O", ">u2", "U1", "u1,u1"):
        frame = np.zeros((8, 8, 3), kind)
        with pytest.raises(
            DTypeError, match=rf"frame: expected uint8, got {re.escape(str(frame.dtype))}"
        ):
            engine.segment(frame)
    with refused(DTypeError, "frame"):
        engine.segment(np.ma.masked_array(FRAME, mask=True))
    with refused(ShapeError, "frame"):
        engine.segment(np.zeros((), np.uint8))


FRAMES = [FRAME, read_photo(demo_photos("scenes")[1])]
FRAMES += [np.ascontiguousarray(FRAME[: 60 + 10 * n, n:]) for n in range(5)]


@pytest.fixture(scope="module", params=[1, 3], ids=lambda n: f"{n} lanes")
def lanes(request):
    config = EngineConfig(
        device="cpu", use_cache=False, num_lanes=request.param, with_scores=True, num_threads=2
    )
    with Engine(Bundle.demo("scenes"), config) as engine:
        engine.set_classes(demo_classes("scenes"))
        yield engine


def test_results_are_those_of_one_by_one(lanes):
    alone = [lanes.segment(frame) for frame in FRAMES]
    for batch in (FRAMES, iter(FRAMES)):
        together = lanes.segment_batch(batch)
        for seg, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(seg.labels, expected.labels)
            np.testing.assert_array_equal(seg.scores, expected.scores)
            assert seg.vocabulary_version == expected.vocabulary_version
    assert lanes.segment_batch([]) == []


def test_a_frame_that_is_refused_leaves_the_engine_usable(lanes):
    with refused(ShapeError, "frame"):
        lanes.segment_batch([*FRAMES[:3], None, *FRAMES[3:]])
    assert len(lanes.segment_batch(FRAMES[:2])) == 2
    opened = [lanes.lane() for _ in range(lanes.config.num_lanes - 1)]  # all were closed
    if opened:
        with refused(EngineStateError, "lanes"):
            lanes.segment_batch(FRAMES)
    for lane in opened:
        lane.close()
    assert len(lanes.segment_batch(FRAMES)) == 7
