"""A frame that cannot be taken is refused with the call that mends it, and that call does."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig, ZssegError, read_photo
from zsseg_rt.demo import demo_photos

FRAME = read_photo(demo_photos("scenes")[0])


@pytest.fixture(scope="module")
def engine():
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu", use_cache=False)) as engine:
        engine.set_classes(["red ball", "grey wall", "blue sky"])
        yield engine


def fake_image():
    """An object of PIL's, where Pillow may be absent."""
    kind = type("Image", (), {"__module__": "PIL.Image", "convert": lambda self, mode: FRAME})
    return kind()


# What is given, words of the message, and the call that the message names: its frame is FRAME.
MENDED = [
    (demo_photos("scenes")[0], "read_photo(path)", read_photo),
    (Path(demo_photos("scenes")[0]), "the path '", read_photo),
    (fake_image(), 'np.array(image.convert("RGB"))', lambda f: np.array(f.convert("RGB"))),
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
]  # fmt: skip


@pytest.mark.parametrize(("given", "words", "mend"), MENDED, ids=[m[1] for m in MENDED])
def test_the_named_call_mends_the_frame(engine, given, words, mend):
    with pytest.raises(ZssegError) as caught:
        engine.segment(given)
    assert words in str(caught.value)
    assert str(caught.value).startswith("frame: expected ")
    np.testing.assert_array_equal(mend(given), FRAME)
    np.testing.assert_array_equal(engine.segment(mend(given)).labels, engine.segment(FRAME).labels)


@pytest.mark.parametrize(
    ("grey", "words", "mend"),
    [
        (FRAME[..., 0].copy(), "COLOR_GRAY2RGB", lambda f: cv2.cvtColor(f, cv2.COLOR_GRAY2RGB)),
        (FRAME[..., :1].copy(), "np.repeat(frame, 3", lambda f: np.repeat(f, 3, axis=2)),
    ],
    ids=["two axes", "three axes"],
)
def test_grey_frames(engine, grey, words, mend):
    with pytest.raises(ZssegError) as caught:
        engine.segment(grey)
    assert words in str(caught.value)
    assert engine.segment(mend(grey)).labels.shape == grey.shape[:2]


def test_what_cv2_could_not_read_is_none(engine, tmp_path):
    with refused(ZssegError, "frame", "cv2.imread"):
        engine.segment(cv2.imread(str(tmp_path / "gone.png")))


def test_tensors_are_told_how_to_become_arrays(engine):
    tensor = type("Tensor", (), {"__module__": "torch"})()
    with refused(ZssegError, "frame", "tensor.cpu"):
        engine.segment(tensor)
