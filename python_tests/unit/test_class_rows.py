"""Vocabularies of about one size share a capture only where further rows change nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.runtime.families.base import bucket_of
from zsseg_rt.runtime.families.registry import create_family

STORED = Path(__file__).parents[1] / "bundles" / "v1"


@pytest.mark.parametrize(
    ("phrases", "most", "rows"),
    [
        (1, 1024, 8),
        (8, 1024, 8),
        (9, 1024, 16),
        (129, 1024, 254),
        (254, 1024, 254),  # the most classes whose labels are bytes
        (255, 1024, 512),
        (513, 1024, 1024),
        (600, 1000, 1000),  # no more than the bundle takes
        (3, 5, 5),
        (40000, 65534, 65534),
    ],
)
def test_buckets(phrases, most, rows):
    assert bucket_of(phrases, most) == rows


def test_clip_rc_takes_exact_numbers():
    """Its patches attend to every query: a further one would change all masks."""
    bundle = Bundle.load(STORED / "descriptor.zsseg")
    for architecture, rows in (("zegclip", 8), ("clip_rc", 5), ("another", 5)):
        family = create_family(replace(bundle, architecture=architecture), EngineConfig())
        assert family.rows_for(5) == rows


@pytest.mark.parametrize("phrases", [1, 5, 8])
def test_further_queries_change_nothing_in_zegclip(phrases):
    config = EngineConfig(device="cpu", precision="float32", use_cache=False)
    with Engine(STORED / "descriptor.zsseg", config) as engine:
        decoder = engine._lane.sessions["decoder"]
        width, patches = (spec.shape for spec in decoder.inputs)
        rng = np.random.default_rng(phrases)
        queries = rng.normal(size=(1, 8, width[2])).astype(np.float32)
        queries[:, phrases:] = queries[:, phrases - 1 : phrases]
        embeds = rng.normal(size=patches).astype(np.float32)

        def run(rows):
            given = {"queries": np.ascontiguousarray(queries[:, :rows]), "patch_embeds": embeds}
            return {name: np.array(array) for name, array in decoder.run(given).items()}

        exact, more = run(phrases), run(8)
    for name, array in exact.items():
        rows = more[name][:, :phrases] if name == "class_embeds" else more[name]
        np.testing.assert_allclose(rows, array, rtol=0, atol=2e-6)  # sums in another order
