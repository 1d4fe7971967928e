"""The engine on a GPU: torch-CUDA runs the graphs, our kernels run the rest."""

import numpy as np
import pytest

from conftest import require_cuda
from support import tiny
from zsseg_rt import Engine, EngineConfig

pytestmark = pytest.mark.needs_cuda


@pytest.fixture(autouse=True)
def gpu():
    """Skip, or fail where a GPU is required."""
    require_cuda()


NAMES = [f"name {index}" for index in range(7)]


def run(bundle, frame, embeds, **settings):
    config = EngineConfig(precision="float32", with_scores=True, use_cache=False, **settings)
    with Engine(bundle, config) as engine:
        engine.set_classes(NAMES, embeddings=embeds)
        assert engine.device == settings["device"]
        results = [engine.segment(frame) for _ in range(3)]
        assert engine.self_check().passed
    return results


def test_gpu_engine_equals_the_cpu_engine(zegclip_model, zegclip_bundle):
    rng = np.random.default_rng(5)
    frame = np.ascontiguousarray(
        rng.integers(0, 256, (9, 11, 3)).astype(np.uint8).repeat(9, 0).repeat(7, 1)
    )
    embeds = tiny.text_embeds(7, zegclip_model.config.image_encoder.embed_dim).numpy()
    cpu, *_ = run(zegclip_bundle, frame, embeds, device="cpu")
    gpu, *again = run(zegclip_bundle, frame, embeds, device="cuda:0", backend="torch")
    assert (gpu.labels == cpu.labels).mean() > 0.999
    np.testing.assert_allclose(gpu.scores, cpu.scores, atol=1e-3)  # TF32-free float32 both sides
    for other in again:
        np.testing.assert_array_equal(other.labels, gpu.labels)
    assert {"image_encoder", "decoder", "upsample_argmax", "total"} <= set(gpu.times)


def test_dense_engine_on_the_gpu(colour_bundle):
    frame = np.random.default_rng(6).integers(0, 256, (123, 77, 3)).astype(np.uint8)
    labels = []
    for settings in ({"device": "cpu"}, {"device": "cuda:0", "backend": "torch"}):
        with Engine(colour_bundle, EngineConfig(use_cache=False, **settings)) as engine:
            for names in (["red", "blue"], ["green", "grey", "white", "black"]):
                engine.set_classes(names)
                labels.append(engine.segment(frame).labels)
    assert (labels[0] == labels[2]).mean() > 0.999
    assert (labels[1] == labels[3]).mean() > 0.999
