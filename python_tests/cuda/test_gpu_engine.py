"""The engine on a GPU, on the stored bundles: torch-CUDA runs the graphs, our kernels the rest.

Needs torch and a GPU that torch sees; no other package of the tests.
"""

from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from zsseg_rt import Bundle, Engine, EngineConfig

pytestmark = pytest.mark.needs_cuda

STORED = Path(__file__).parents[1] / "bundles" / "v1"
FAMILIES = ("dense", "descriptor", "segment_tokens")  # torch lacks operators of proposals' graphs
ON_CPU = {"device": "cpu", "backend": "torch"}
ON_GPU = {"device": "cuda:0", "backend": "torch"}


@pytest.fixture(autouse=True)
def gpu():
    """Skip, or fail where a GPU is required."""
    pytest.importorskip("torch")
    require_cuda()


def frames():
    """Two frames of different sizes, made of blocks."""
    rng = np.random.default_rng(5)
    small = rng.integers(0, 256, (9, 11, 3)).astype(np.uint8)
    return [np.ascontiguousarray(small.repeat(9, 0).repeat(wide, 1)) for wide in (7, 12)]


def open_engine(family, placed, **settings):
    usual = {"precision": "float32", "with_scores": True, "with_times": True, "use_cache": False}
    config = usual | placed | settings
    return Engine(STORED / f"{family}.zsseg", EngineConfig(**config))


def names_of(family):
    return list(Bundle.load(STORED / f"{family}.zsseg").text_bank.names)


def run(family, placed):
    """Results of two frames with all names, with two of them and with all again, interleaved."""
    results, names = [], names_of(family)
    with open_engine(family, placed) as engine:
        assert engine.device == placed["device"]
        for classes in (names, names[:2], names):
            engine.set_classes(classes)
            results += [engine.segment(frame) for frame in frames()]
        report = engine.self_check()
        assert report.passed, report.first_failure
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_engine_equals_the_cpu_engine(family):
    """And gives the same again, after frames of another size and other classes."""
    results = run(family, ON_GPU)
    for cpu, gpu in zip(run(family, ON_CPU), results, strict=True):
        assert gpu.labels.dtype == cpu.labels.dtype
        same = gpu.labels == cpu.labels
        assert same.mean() > 0.999
        np.testing.assert_allclose(gpu.scores[same], cpu.scores[same], atol=1e-3)  # no TF32
        assert set(gpu.times) == set(cpu.times)
    for first, again in zip(results[:2], results[4:], strict=True):
        np.testing.assert_array_equal(first.labels, again.labels)
        np.testing.assert_array_equal(first.scores, again.scores)


def test_half_precision_agrees():
    """A bundle that holds float16 graphs runs them where precision is "auto"."""
    labels = []
    for precision in ("float32", "auto"):
        with open_engine("descriptor", ON_GPU, precision=precision) as engine:
            engine.set_classes(names_of("descriptor"))
            labels.append([engine.segment(frame).labels for frame in frames()])
    assert engine.precision == "float16"
    for whole, half in zip(*labels, strict=True):
        assert (whole == half).mean() > 0.9  # random weights: many pixels are near ties


def test_lanes_label_at_the_same_time():
    with open_engine("descriptor", ON_GPU, num_lanes=2) as engine, engine.lane() as lane:
        engine.set_classes(names_of("descriptor"))
        for frame in frames():
            expected = engine.segment(frame).labels
            np.testing.assert_array_equal(lane.segment(frame).labels, expected)
