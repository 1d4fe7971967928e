"""Names that are left out of frames on a GPU, recorded ones too; the emulated one will do."""

from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support.device_backend import device_backend
from zsseg_rt import Bundle, Engine, EngineConfig

STORED = Path(__file__).parents[1] / "bundles" / "v1"


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", ["dense", "descriptor", "aggregation"])
def test_a_gpu_leaves_out_names_of_recorded_frames_too(name, monkeypatch):
    require_cuda()
    placed, bundle = device_backend(monkeypatch)[0], Bundle.load(STORED / f"{name}.zsseg")
    names = list(bundle.text_bank.names)
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)

    def label_all(most):
        config = EngineConfig(**placed, use_cache=False, max_candidates=most)
        with Engine(bundle, config) as engine:
            engine.set_classes(names)
            return [engine.segment(frames[number % 2]) for number in range(6)]

    plain, same, few = (label_all(most) for most in (None, len(names), 2))
    for number, found in enumerate(few):
        assert np.array_equal(same[number].labels, plain[number].labels)
        assert len(found.candidates) == 2
        assert {found.names[index] for index in np.unique(found.labels)} <= set(found.candidates)
        first = few[number % 2]  # before anything was recorded
        assert found.candidates == first.candidates
        assert np.array_equal(found.labels, first.labels)
