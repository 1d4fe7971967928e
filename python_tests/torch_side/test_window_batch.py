"""Several windows of a frame in one run of the graphs: the labels are those of one by one."""

import json

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("torch", reason="needs pip install '.[train]'")

import torch

from conftest import require_cuda
from support import tiny
from support.cuda_counts import count_captures
from support.device_backend import device_backend
from support.errors import refused
from support.rtx_plans import build_plan
from zsseg_rt import ArgumentError, Bundle, BundleError, Engine, EngineConfig, ShapeError
from zsseg_rt.common.arrays import row_of
from zsseg_rt.export import export_bundle
from zsseg_rt.models import create_model
from zsseg_rt.ops import core
from zsseg_rt.runtime.families.dense import DensePipeline
from zsseg_rt.runtime.families.descriptor import DescriptorPipeline

SIZES = tiny.TinySizes(num_layers=3, text_layers=1)
HEADS = {"num_heads": SIZES.num_heads, "text_heads": SIZES.text_heads}
MODELS = {
    "naclip": ("dense_clip", {"head": "naclip"}),
    "maskclip": ("dense_clip", {"head": "maskclip"}),
    "cosine_head": ("cosine_head", {}),
    "zegclip": ("zegclip", {}),
}
FRAME = np.random.default_rng(0).integers(0, 256, (96, 300, 3), np.uint8)  # six windows


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("window_batch")
    torch.save(tiny.clip_state_dict(SIZES), folder / "clip.pt")

    def build(name, window_batch):
        path = folder / f"{name}-{window_batch}.zsseg"
        if not path.exists():
            architecture, settings = MODELS[name]
            given = {"image_size": 64, "activation": "quick_gelu", **HEADS, **settings}
            torch.manual_seed(0)
            model = create_model(architecture, pretrained=folder / "clip.pt", **given)
            export_bundle(model, path, text_encoder=None, window_batch=window_batch)
        return path

    return build


def label(bundle, **settings):
    usual = {"device": "cpu", "precision": "float32", "use_cache": False, "with_scores": True}
    with Engine(bundle, EngineConfig(**usual | {"windows": "auto"} | settings)) as engine:
        rows = np.random.default_rng(1).standard_normal((5, SIZES.embed_dim)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        engine.set_classes([f"name {index}" for index in range(5)], embeddings=rows)
        return [engine.segment(FRAME) for _ in range(3)][-1]


@pytest.mark.parametrize("window_batch", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_labels_are_those_of_windows_one_by_one(build, name, window_batch, monkeypatch):
    pipeline = DescriptorPipeline if name == "zegclip" else DensePipeline
    bundles = [build(name, batch) for batch in (window_batch, 1)]
    masks, rows = pipeline.masks, []

    def counted(self, image, *given):
        rows.append(image.shape[0])
        return masks(self, image, *given)

    monkeypatch.setattr(pipeline, "masks", counted)
    found, expected = map(label, bundles)
    one_frame = {2: [2, 2, 2], 4: [4, 2]}[window_batch]
    assert rows == one_frame * 3 + [1] * 18
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    assert np.mean(found.labels == expected.labels) > 0.9999
    assert len(np.unique(expected.labels)) > 1


def test_frames_without_windows_are_labelled_as_ever(build):
    found, expected = (label(build("naclip", batch), windows=None) for batch in (4, 1))
    np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", ["naclip", "zegclip"])
def test_windows_are_recorded_once_in_batches_of_one_size(build, name, monkeypatch):
    require_cuda()
    placed = device_backend(monkeypatch)[0]
    with monkeypatch.context() as plain:
        plain.setenv("ZSSEG_CUDA_GRAPHS", "0")
        expected = label(build(name, 1), **placed)
    launched = count_captures(monkeypatch)
    found = label(build(name, 4), **placed)
    assert launched["recorded"] == 2  # three windows, which are run twice, and the labels
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", ["naclip", "zegclip"])
def test_plans_take_any_number_of_windows(build, name, precision, monkeypatch):
    axes = {"windows": (1, 4, 4)}
    bundle = build(name, 4)
    report = build_plan(bundle, precision, monkeypatch, dynamic_axes=axes).report
    assert report["inputs"][0]["shape"][1:] == [3, 64, 64]


def test_the_bundle_states_it_only_where_it_is_so(build):
    heads = [json.loads((build("naclip", n) / "bundle.json").read_text())["head"] for n in (1, 4)]
    assert "window_batch" not in heads[0]
    assert heads[1]["window_batch"] == 4
    assert Bundle.load(build("naclip", 4)).head.window_batch == 4


def test_what_cannot_be_is_refused(tmp_path):
    sizes = tiny.TinySizes(num_layers=2)
    for model, batch in ((tiny.clip_rc_model(sizes), 2), (tiny.zegclip_model(sizes), 3)):
        with refused(ArgumentError, "window_batch"):
            export_bundle(model, tmp_path / "a.zsseg", text_encoder=None, window_batch=batch)
    assert not list(tmp_path.iterdir())


def test_other_families_state_no_windows(tmp_path):
    stored = Bundle.demo("photos").path
    manifest = json.loads((stored / "bundle.json").read_text())
    for family, batch in (("segment_tokens", 2), ("dense", 3)):
        place = tmp_path / f"{family}.zsseg"
        place.mkdir()
        for path in stored.iterdir():
            (place / path.name).symlink_to(path)
        (place / "bundle.json").unlink()
        head = manifest["head"] | {"align": "half_pixel", "window_batch": batch}
        changed = manifest | {"family": family, "head": head}
        (place / "bundle.json").write_text(json.dumps(changed))
        with refused(BundleError, None, "window_batch"):
            Bundle.load(place)


@pytest.mark.needs_cuda
def test_rows_on_a_device_are_views():
    require_cuda()
    host = np.arange(24, dtype=np.float32).reshape(4, 6)
    array = core.DeviceArray.from_numpy(host, device=0)
    np.testing.assert_array_equal(row_of(array, 2).numpy(), host[2])
    assert row_of(array, 4 - 1).shape == (6,)
    for shape, first in (((6,), 19), ((1,), -1), ((25,), 0)):
        with refused(ShapeError, "shape"):
            array.view(shape, first=first)
