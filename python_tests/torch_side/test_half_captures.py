"""Captured frames whose graphs and kernels hand each other half precision.

Runs on any CUDA device, the emulated one included. Sessions refuse inputs of another dtype than
their graph's file states.
"""

import numpy as np
import pytest

pytest.importorskip("onnx")

pytest.importorskip("torch", reason="needs pip install '.[train]'")

from conftest import require_cuda
from support.cuda_counts import count_captures, counts_reader
from support.device_backend import device_backend
from support.half_bundles import half_and_wide, stored_in_half
from zsseg_rt import Engine, EngineConfig, ops
from zsseg_rt.bundles.specs import FAMILIES

pytestmark = pytest.mark.needs_cuda

FRAMES = [
    np.random.default_rng(seed).integers(0, 256, (31, 47, 3), np.uint8) for seed in (1, 2, 3, 1)
]
# Of a frame, the graphs apart: preprocess, relationship_descriptor, patch_text_similarity and
# upsample_argmax.
LAUNCHES = 4


@pytest.fixture(scope="module", params=["zegclip", "clip_rc"])
def bundle(request, tmp_path_factory):
    """A bundle of float16 graphs: one query a class, or one for each of four cells."""
    require_cuda()
    folder = tmp_path_factory.mktemp("half")
    if request.param == "zegclip":
        return stored_in_half("descriptor", folder)
    return half_and_wide("clip_rc", folder)[0]


@pytest.fixture
def backend(monkeypatch):
    """Settings of an engine whose graphs can be captured, and its sessions."""
    return device_backend(monkeypatch)


def open_engine(backend, bundle):
    config = {"precision": "auto", "with_scores": True, "use_cache": False} | backend[0]
    return Engine(bundle, EngineConfig(**config))


def words(engine, count, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, engine.bundle.text.embed_dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return {
        "class_names": [f"name {index}" for index in range(count)],
        "embeddings": rows.astype(np.float32),
    }


def label_all(engine, swaps):
    found = []
    for count, seed in swaps:
        engine.set_classes(**words(engine, count, seed))
        found += [engine.segment(frame) for frame in FRAMES]
    return found


@pytest.mark.parametrize("swaps", [[(5, 0)], [(23, 1), (7, 2), (6, 3), (23, 4)]])
def test_replayed_frames_equal_plain_ones(monkeypatch, backend, bundle, swaps):
    counts = count_captures(monkeypatch)
    with open_engine(backend, bundle) as engine:
        found = label_all(engine, swaps)
    assert counts["recorded"] >= 1
    assert counts["launched"] >= (len(FRAMES) - 1) * len({count for count, _ in swaps})
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    before = dict(counts)
    with open_engine(backend, bundle) as engine:
        expected = label_all(engine, swaps)
    assert counts == before
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.scores, other.scores)
    assert len({seg.labels.tobytes() + seg.scores.tobytes() for seg in found}) >= 3 * len(swaps)


def test_kernels_are_given_what_graphs_state(monkeypatch, backend, bundle):
    """Dtypes of what a frame's kernels read and write, and of what its graphs do."""
    seen = {}

    def watch(name):
        kernel = getattr(ops, name)

        def watched(*arrays, **settings):
            seen[name] = [str(settings["out"].dtype), *(str(array.dtype) for array in arrays)]
            return kernel(*arrays, **settings)

        monkeypatch.setattr(ops, name, watched)

    with open_engine(backend, bundle) as engine:
        engine.set_classes(**words(engine, 5))
        engine.segment(FRAMES[0])
        for name in ("preprocess", "relationship_descriptor", "patch_text_similarity"):
            watch(name)
        engine.segment(FRAMES[1])
        engine.segment(FRAMES[2])
        halves = FAMILIES[engine.bundle.family].half_tensors
        for session in backend[1]:
            for spec in (*session.inputs, *session.outputs):
                assert spec.dtype == ("float16" if spec.name in halves else "float32"), spec
    assert seen["preprocess"] == ["float16", "uint8"]
    queries, given, bias = "float16", ["float16"] * 3, "float32"
    assert seen["relationship_descriptor"] == [queries, *given, bias]
    products = ["float32", "float16", "float16"]
    assert seen["patch_text_similarity"] == products


def test_a_replayed_frame_converts_nothing(monkeypatch, backend, bundle):
    """No launch but the budget's and the graphs', no copy but the frame's, labels' and scores'."""
    read = counts_reader()
    with open_engine(backend, bundle) as engine:
        label_all(engine, [(5, 0), (5, 1)])
        before, runs = read(), [session.runs for session in backend[1]]
        engine.segment(FRAMES[2])
        found = {name: count - before[name] for name, count in read().items()}
        assert [session.runs for session in backend[1]] == runs
        in_graphs = sum(len(session.outputs) for session in backend[1])
    assert found["graph_launches"] == 1
    assert found["launches"] - in_graphs == LAUNCHES
    assert (found["copies_to_device"], found["copies_to_host"]) == (1, 2)
    assert (found["copies_on_device"], found["allocations"], found["frees"]) == (0, 0, 0)
