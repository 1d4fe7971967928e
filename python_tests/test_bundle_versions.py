"""Bundles of every format version ever written still load and give what they gave."""

from pathlib import Path

import numpy as np
import pytest

from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.bundle import FORMAT_VERSION

FOLDER = Path(__file__).parent / "bundles"
BUNDLES = sorted(FOLDER.glob("v*/*.zsseg"))


def test_every_version_is_kept():
    versions = {path.parent.name for path in BUNDLES}
    assert versions == {f"v{number}" for number in range(1, FORMAT_VERSION + 1)}


@pytest.mark.parametrize("path", BUNDLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_old_bundle_still_runs(path):
    bundle = Bundle.load(path)
    bundle.verify()
    config = EngineConfig(device="cpu", precision="float32", use_cache=False)
    with Engine(bundle, config) as engine:
        report = engine.self_check()
        assert report.passed, report.first_failure
        names = list(bundle.text_bank.names)[:3]
        engine.set_classes(names)
        labels = engine.segment(np.zeros((30, 40, 3), np.uint8)).labels
    assert labels.max() < 3
