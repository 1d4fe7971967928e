"""The engine's half of a GPU run: its copies, streams and kernels, with graphs computed on the CPU.

What TensorRT or torch would compute on the device, a session on the CPU computes on the host; all
else is as on a GPU, also the product's TensorRT session where it is asked for. Runs on any CUDA
device, the emulated one included.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import require_cuda
from support.errors import refused
from support.host_backend import HostSession, host_backend
from zsseg_rt import Engine, EngineConfig, FrameMemory, ops
from zsseg_rt.errors import BackendError

pytestmark = pytest.mark.needs_cuda

NAMES = [f"name {index}" for index in range(7)]
SESSIONS = ("own arrays", "foreign arrays", "TensorRT's")


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """Skip, or fail where a GPU is required, before any bundle is made."""
    require_cuda()


@pytest.fixture
def session_kind() -> str:
    return "own arrays"


@pytest.fixture
def gpu_config(session_kind, monkeypatch) -> dict[str, Any]:
    """Settings of an engine on ``cuda:0`` whose graphs the host computes."""
    return host_backend(monkeypatch, session_kind)


def frame(height: int = 81, width: int = 77) -> np.ndarray:
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (9, 7, 3)).astype(np.uint8)
    big = blocks.repeat(-(-height // 9), 0).repeat(-(-width // 7), 1)
    return np.ascontiguousarray(big[:height, :width])


def assert_equal_to_the_cpu(bundle, gpu_config, names, embeds, **settings):
    """Frames of two sizes and two sets of classes, interleaved, on both devices."""
    results = {}
    for device, placed in (("cpu", {"device": "cpu"}), ("cuda:0", gpu_config)):
        usual = {"precision": "float32", "with_scores": True, "with_times": True}
        config = EngineConfig(**usual, use_cache=False, **placed, **settings)
        with Engine(bundle, config) as engine:
            assert engine.device == device
            results[device] = []
            for count in (len(names), 2):
                rows = None if embeds is None else embeds[..., :count, :]
                engine.set_classes(names[:count], embeddings=rows)
                results[device] += [engine.segment(frame()), engine.segment(frame(60, 13))]
            assert engine.self_check().passed
    for cpu, gpu in zip(results["cpu"], results["cuda:0"], strict=True):
        assert gpu.labels.shape == cpu.labels.shape
        assert gpu.labels.dtype == cpu.labels.dtype
        assert (gpu.labels == cpu.labels).mean() > 0.999
        same = gpu.labels == cpu.labels
        np.testing.assert_allclose(gpu.scores[same], cpu.scores[same], rtol=0, atol=2e-4)
        assert set(gpu.times) == set(cpu.times)


STORED = Path(__file__).parents[1] / "bundles" / "v1"


def export(model, path, **settings):
    """Write a bundle; skips where what exports one is not installed."""
    pytest.importorskip("torch")
    from zsseg_rt.export import export_bundle

    return export_bundle(model, path, precisions=("float32",), verify=False, **settings)


@pytest.fixture(scope="module")
def tiny():
    """The module that makes models; it needs what torch models need."""
    for package in ("cv2", "torch"):
        pytest.importorskip(package)
    from support import tiny

    return tiny


@pytest.mark.parametrize("session_kind", SESSIONS)
@pytest.mark.parametrize("settings", [{}, {"unknown_below": 0.5, "channel_order": "bgr"}])
def test_descriptor(gpu_config, settings):
    assert_equal_to_the_cpu(STORED / "descriptor.zsseg", gpu_config, NAMES, None, **settings)


def test_clip_rc(gpu_config, tmp_path, tiny):
    path = tmp_path / "rc.zsseg"
    model = tiny.clip_rc_model()
    export(model, path, class_names=NAMES, text_encoder=None)
    assert_equal_to_the_cpu(path, gpu_config, NAMES, tiny.text_embeds(7, 32).numpy())


def test_dense(gpu_config):
    names = ["red", "blue", "green", "grey", "white", "black"]
    assert_equal_to_the_cpu(STORED / "dense.zsseg", gpu_config, names, None)


@pytest.fixture(scope="module")
def tiny_zegformer(tiny):
    from support import tiny_zegformer

    return tiny_zegformer


@pytest.fixture(scope="module")
def zegformer_embeds(tiny_zegformer):
    return np.stack([tiny_zegformer.text_features(salt).numpy() for salt in ("a", "b")])


@pytest.fixture(scope="module")
def zegformer_bundle(tiny_zegformer, zegformer_embeds, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "zegformer.zsseg"
    model = tiny_zegformer.model(region_batch=3)
    bank = (NAMES, zegformer_embeds)
    return export(model, path, class_names=NAMES, size_hw=(64, 96), text_bank=bank)


@pytest.mark.parametrize("session_kind", SESSIONS)
@pytest.mark.parametrize("settings", [{}, {"min_region_score": 0.3}])
def test_proposals(zegformer_bundle, zegformer_embeds, gpu_config, settings):
    assert_equal_to_the_cpu(zegformer_bundle, gpu_config, NAMES, zegformer_embeds, **settings)


def test_segment_tokens(gpu_config, tmp_path, tiny):
    from support.tiny_zeroseg import zeroseg_model

    path = export(zeroseg_model(), tmp_path / "zeroseg.zsseg")
    assert_equal_to_the_cpu(path, gpu_config, NAMES, tiny.text_embeds(7, 32).numpy())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error(gpu_config, monkeypatch, value):
    run = HostSession.run

    def broken(self, feeds, *, stream=0):
        results = run(self, feeds, stream=stream)
        for name, array in results.items():
            host = array.numpy(stream=stream)
            host.flat[5] = value
            results[name] = ops.DeviceArray.from_numpy(host, 0, stream)
        return results

    monkeypatch.setattr(HostSession, "run", broken)
    with Engine(STORED / "dense.zsseg", EngineConfig(use_cache=False, **gpu_config)) as engine:
        engine.set_classes(["red", "blue"])
        with refused(BackendError, "mask_logits", "NaN"):
            engine.segment(frame())


@pytest.mark.parametrize("bundle", ["descriptor", "dense"])
def test_a_memory_stays_on_the_device(gpu_config, monkeypatch, bundle):
    """A pan with a cut in it, labelled with a memory on both devices."""
    cv2 = pytest.importorskip("cv2")
    names = NAMES if bundle == "descriptor" else ["red", "blue", "green"]
    rng, blended, warp_blend = np.random.default_rng(3), [], ops.warp_blend
    scenes = [cv2.resize(rng.integers(0, 256, (20, 40, 3), np.uint8), (400, 200)) for _ in "ab"]
    frames = [
        np.ascontiguousarray(scene[:, 9 * n : 9 * n + 256]) for scene in scenes for n in (0, 1, 2)
    ]

    def watched(*arrays, **settings):
        blended.append([type(array) for array in arrays])
        return warp_blend(*arrays, **settings)

    monkeypatch.setattr(ops, "warp_blend", watched)
    found = {}
    for device, placed in (("cpu", {"device": "cpu"}), ("cuda:0", gpu_config)):
        usual = {"precision": "float32", "with_scores": True, "with_times": True}
        config = EngineConfig(**usual, use_cache=False, **placed)
        memory = FrameMemory(skip_still=True)
        with Engine(STORED / f"{bundle}.zsseg", config) as engine:
            engine.set_classes(names)
            found[device] = [engine.segment(f, memory=memory) for f in (*frames, frames[-1])]
            assert all("steady" in seg.times for seg in found[device][:-1])
    assert blended[len(frames) :] == [[ops.DeviceArray] * 4] * len(frames)
    for cpu, gpu in zip(found["cpu"], found["cuda:0"], strict=True):
        assert (gpu.labels == cpu.labels).mean() > 0.999
        np.testing.assert_allclose(gpu.scores, cpu.scores, rtol=0, atol=2e-3)
    for results in found.values():
        assert [seg.reused for seg in results] == [False] * len(frames) + [True]


def addresses(classes):
    arrays = (classes.text_embeds, classes.text_queries)
    return [array.__cuda_array_interface__["data"][0] for array in arrays]


def test_class_buffers_keep_their_addresses(gpu_config):
    """A vocabulary of equal or smaller size is copied to where the last one lay."""
    config = EngineConfig(precision="float32", use_cache=False, **gpu_config)
    with Engine(STORED / "descriptor.zsseg", config) as engine:
        found, labels = [], []
        for names in (NAMES, NAMES[::-1], NAMES[:2], NAMES):
            engine.set_classes(names)
            labels.append(engine.segment(frame()).labels)
            found.append(addresses(engine._lane._adopted))
        assert found == [found[0]] * 4
        np.testing.assert_array_equal(labels[0], labels[3])
        assert (labels[0] != labels[1]).any()


def test_lanes_have_streams_of_their_own(gpu_config):
    config = EngineConfig(precision="float32", use_cache=False, num_lanes=2, **gpu_config)
    with Engine(STORED / "descriptor.zsseg", config) as engine, engine.lane() as lane:
        engine.set_classes(NAMES)
        assert lane.workspace.stream != engine._lane.workspace.stream
        expected = engine.segment(frame()).labels
        np.testing.assert_array_equal(lane.segment(frame()).labels, expected)
