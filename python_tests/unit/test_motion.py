"""Motion between grey pictures: found where there is one, refused where the scene was cut."""

import cv2
import numpy as np
import pytest

from zsseg_rt.runtime.frame_memory import Glance, MotionEstimator, is_still

GRID = (8, 16)  # rows, columns: cells of 16 by 8 pixels


def texture(seed, contrast=60.0, size=192):
    """Smooth random grey, so that every place looks different."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal((size, size)), (0, 0), 4)
    return np.clip(128 + contrast * noise / noise.std(), 0, 255).astype(np.uint8)


def window(picture, x, y):
    return np.ascontiguousarray(picture[y : y + 128, x : x + 128])


def glance(grey):
    return Glance(colours=np.repeat(grey[..., None], 3, axis=2), grey=grey)


def between(past, grey):
    return MotionEstimator().between(glance(past), glance(grey), GRID)


def still(past, grey):
    return is_still(glance(past), glance(grey))


def grey_picture(frame, order):
    return Glance.at(frame, order).grey


@pytest.mark.parametrize("step", [(0, 0), (1, 0), (-3, 2), (6, -6)])
def test_the_flow_leads_to_where_a_cell_was(step):
    scene = texture(1)
    past, grey = window(scene, 30, 30), window(scene, 30 + step[0], 30 + step[1])
    motion = between(past, grey)
    assert motion.flow.shape == (1, *GRID, 2)
    assert motion.flow.dtype == motion.past_weight.dtype == np.float32
    inner = motion.flow[0, 1:-1, 2:-2]
    expected = [step[0] / 8, step[1] / 16]  # what is at x was at x + step
    np.testing.assert_allclose(inner, np.broadcast_to(expected, inner.shape), atol=0.08)
    assert motion.past_weight.min() >= 0.0
    assert motion.past_weight.max() <= 1.0
    assert np.median(motion.past_weight) > 0.5


def test_what_looks_different_counts_less():
    past = window(texture(2), 10, 10)
    grey = past.copy()
    grey[32:64, 64:96] = 255 - grey[32:64, 64:96] // 4
    weight = between(past, grey).past_weight[0]
    assert weight[2:4, 8:12].max() < 0.6 * weight[5:].min()


def test_colours_of_equal_grey_differ():
    grey = window(texture(2), 10, 10)
    past, now = glance(grey), glance(grey)
    now.colours[64:96, 32:64] = (87, 40, 255)
    past.colours[64:96, 32:64] = (87, 200, 0)
    weight = MotionEstimator().between(past, now, GRID).past_weight[0]
    assert weight[4:6, 4:8].max() == 0.0
    assert weight[:3].min() > 0.5


def test_what_comes_in_counts_less_than_what_was_there():
    scene = texture(1)
    weight = between(window(scene, 30, 30), window(scene, 36, 30)).past_weight[0]
    assert weight[1:-1, -1].max() < 0.2  # three quarters of the last column's cells are new
    assert weight[1:-1, 1:-2].min() > 0.5


def test_noise_does_not_lower_the_weight():
    scene, rng = window(texture(3), 0, 0), np.random.default_rng(0)
    noisy = [np.clip(scene + rng.normal(0, 5, scene.shape), 0, 255).astype(np.uint8) for _ in "ab"]
    without, with_noise = between(scene, scene).past_weight, between(*noisy).past_weight
    np.testing.assert_allclose(with_noise, without, atol=0.1)


@pytest.mark.parametrize("contrast", [60.0, 20.0])
def test_a_cut_is_seen_in_bright_and_in_dull_scenes(contrast):
    scenes = [window(texture(seed, contrast), 0, 0) for seed in range(6)]
    cuts = [between(a, b) is None for a in scenes for b in scenes if a is not b]
    assert all(cuts)


@pytest.mark.parametrize("level", [0, 40, 255])
def test_flat_pictures_follow_each_other(level):
    flat = np.full((128, 128), level, np.uint8)
    assert between(flat, flat) is not None


def test_fading_light_is_no_cut():
    scene = window(texture(5), 0, 0)
    assert between(scene, (scene * 0.95).astype(np.uint8)) is not None


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2), (128, 128), (720, 1280)])
def test_frames_of_any_size_become_grey_pictures(size):
    frame = np.empty((*size, 3), np.uint8)
    frame[...] = (10, 100, 200)
    grey = grey_picture(frame, "rgb")
    assert grey.shape == (128, 128)
    assert grey.dtype == np.uint8
    assert set(np.unique(grey)) == {round(0.299 * 10 + 0.587 * 100 + 0.114 * 200)}
    turned = np.ascontiguousarray(frame[..., ::-1])
    np.testing.assert_array_equal(grey_picture(turned, "bgr"), grey)


def test_a_grey_picture_shows_what_is_where():
    frame = np.zeros((300, 600, 3), np.uint8)
    frame[:150, 300:] = 200
    expected = np.zeros((128, 128))
    expected[:64, 64:] = 200
    assert np.abs(grey_picture(frame, "rgb") - expected).mean() < 2


CELL = 4  # pixels of a 128 picture per cell of 32


@pytest.mark.parametrize(("cells", "levels", "expected"), [(1024, 6, True), (10, 100, True),
                                                        (11, 7, False), (11, 6, True)])  # fmt: skip
def test_a_picture_is_still_while_few_cells_change_or_all_by_little(cells, levels, expected):
    past = np.full((128, 128), 90, np.uint8)
    grey = past.copy()
    for cell in range(cells):
        y, x = divmod(cell, 32)
        grey[CELL * y : CELL * (y + 1), CELL * x : CELL * (x + 1)] += np.uint8(levels)
    assert still(past, grey) is expected
    assert still(grey, past) is expected
