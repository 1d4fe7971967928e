"""Names and a legend on a picture: there, readable, in the right colours, and optional."""

import dataclasses

import cv2
import numpy as np
import pytest

from support.command_line import run
from support.errors import refused
from zsseg_rt import ArgumentError, Segmentation, read_photo
from zsseg_rt.demo import demo_photos
from zsseg_rt.results.segmentation import Frame
from zsseg_rt.results.visualize import palette


def halves(names=("road", "blue sky"), height=600, width=800):
    labels = np.zeros((height, width), np.uint8)
    labels[: height // 2] = 1
    return Segmentation(labels=labels, names=names, vocabulary_version=1)


def black(seg):
    return np.zeros((*seg.labels.shape, 3), np.uint8)


def test_names_are_on_the_parts_and_the_legend_is_below():
    seg = halves()
    frame = black(seg)
    overlay, plot = seg.overlay(frame), seg.plot(frame)
    assert plot.shape[0] > 600
    assert plot.shape[1] == 800
    changed = (plot[:600] != overlay).any(axis=2)
    for half in (changed[:300], changed[300:]):
        rows = np.flatnonzero(half.any(axis=1))
        assert 800 * 11 / 400 <= np.ptp(rows) < 80  # as high as can be read at a phone's width
    strip = plot[600:].reshape(-1, 3)
    for colour in palette(seg.names):
        assert (strip == colour).all(axis=1).sum() > 100
    np.testing.assert_array_equal(seg.plot(frame, names=False)[:600], overlay)
    assert seg.plot(frame, legend=False).shape == (600, 800, 3)


def test_letters_have_a_dark_edge_all_around():
    seg = dataclasses.replace(halves(), labels=np.zeros((600, 800), np.uint8))
    plot = seg.plot(np.full((600, 800, 3), 128, np.uint8), alpha=0.0, legend=False)
    light, dark = (np.flatnonzero(found.any(axis=0)) for found in (plot[..., 0] > 200,
                                                                   plot[..., 0] < 60))  # fmt: skip
    assert 0 < light[0] - dark[0] < 10
    assert 0 < dark[-1] - light[-1] < 10


def test_the_frame_s_channel_order_is_kept():
    rgb = halves()
    bgr = dataclasses.replace(rgb, channel_order="bgr")
    np.testing.assert_array_equal(bgr.plot(black(bgr))[..., ::-1], rgb.plot(black(rgb)))


@pytest.mark.parametrize("width", [1, 40, 399, 400, 2000])
def test_odd_sizes(width):
    seg = halves(height=max(1, width // 2), width=width)
    plot = seg.plot(black(seg))
    assert plot.shape[1] >= 400
    assert plot.shape[1] % width == 0


@pytest.mark.parametrize("name", ["Straße über café", "道路", "a" * 300, "{odd} %s \\ name"])
def test_odd_names(name):
    seg = halves((name, "sky"))
    assert seg.plot(black(seg)).shape[1] == 800


def test_a_result_of_a_stream_brings_its_frame():
    seg = halves()
    frame = Frame(source="0", index=0, captured_at=0.0, clock="file", image=black(seg))
    with_frame = dataclasses.replace(seg, frame=frame)
    np.testing.assert_array_equal(with_frame.plot(), seg.plot(black(seg)))
    with refused(ArgumentError, "frame"):
        seg.plot()


def test_nothing_but_unknown_pixels():
    seg = dataclasses.replace(halves(), labels=np.full((600, 800), 255, np.uint8))
    np.testing.assert_array_equal(seg.plot(black(seg)), black(seg))


def test_segment_writes_legends_on_request(tmp_path):
    call = ("segment", demo_photos("scenes")[0], "--demo", "scenes", "-o", tmp_path)
    assert run(*call) == 0
    plain = cv2.imread(str(tmp_path / "playroom.overlay.png"))
    assert plain.shape == read_photo(demo_photos("scenes")[0]).shape
    assert run(*call, "--legend", "--resume") == 0  # other settings: done again
    with_legend = cv2.imread(str(tmp_path / "playroom.overlay.png"))
    assert with_legend.shape[0] > 2 * plain.shape[0]
    assert with_legend.shape[1] == 2 * plain.shape[1]
