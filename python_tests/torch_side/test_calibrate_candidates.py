"""Many settings are judged at once as the model would label with each of them."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from support import tiny  # noqa: E402
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score  # noqa: E402
from zsseg_rt.training.calibration import judging  # noqa: E402
from zsseg_rt.training.calibration.candidates import (  # noqa: E402
    CandidateCounts,
    Grid,
    ImageMaps,
    Setting,
)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("make", [tiny.zegclip_model, tiny.clip_rc_model])
def test_counts_are_those_of_the_model_s_own_labels(make, activation):
    """For images no larger than the lattice, every pixel is judged."""
    model = make().eval()
    model.config = replace(model.config, score_activation=activation)
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (40, 46, 3), np.uint8) for _ in range(2)]
    truths = [rng.integers(0, 7, (40, 46)) for _ in images]
    rows = tiny.text_embeds(6, model.config.image_encoder.embed_dim)
    seen, classes, shares = (0, 1, 4), np.array([0, 1, 2, 2, 3, 4]), (1.0, 1.0, 0.5, 0.5, 1.0, 1.0)
    grid = Grid(seen_weights=(0.0, 0.3), unseen_weights=(0.0, 0.7), scales=(4.0, 12.0))
    is_seen = np.array([True, True, False, True, False])
    counts = CandidateCounts(
        grid=grid, classes=classes, shares=shares, seen=is_seen, activation=activation, own_bias=0.1
    )
    twin = model.with_seen(np.flatnonzero(is_seen[classes]).tolist(), shares=shares)
    for image, truth in zip(images, truths, strict=True):
        counts.add(maps_of(twin, image, truth, rows))
    assert counts.settings[counts.own] == Setting(None, 0.1)
    for place in range(0, len(counts.settings), 7):
        setting = counts.settings[place]
        confusion = ConfusionMatrix(5, ignore_label=255)
        judged = twin.with_cosine(setting.cosine, seen_bias=setting.seen_bias)
        for image, truth in zip(images, truths, strict=True):
            with torch.inference_mode():
                labels = classes[judged.label(image, rows).numpy()]
            confusion.update(np.where(truth < 5, truth, 255), labels)
        expected = score(confusion.counts, np.flatnonzero(is_seen).tolist())
        found = counts.predicted[place]
        assert np.abs(found - confusion.counts.sum(axis=0)[:5]).sum() <= 4  # of 4000, near ties
        assert counts.harmonic_means()[place] == pytest.approx(100 * expected.hiou, abs=0.2)
    assert len({tuple(found) for found in counts.predicted}) > 20  # settings do differ
    assert seen[0] == 0


def maps_of(model, image, truth, rows):
    with torch.inference_mode():
        logits, cosines = judging.grid_maps(model, image, rows)
    return ImageMaps(mask_logits=logits, cosines=cosines, labels=truth)


def test_the_grid_knows_no_rule_of_two_zeros_and_tries_the_run_s_own_bias():
    grid = Grid().with_bias(0.07)
    assert None in grid.rules()
    assert 0.07 in grid.biases
    assert grid.with_bias(0.07) == grid
    assert len(grid.settings()) == len(grid.rules()) * len(grid.biases)
    assert len({(s.cosine, s.seen_bias) for s in grid.settings()}) == len(grid.settings())
