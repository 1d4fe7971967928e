"""Which graphs of each family are quantised, and that the others run beside them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.cpus import needs_vnni
from support.errors import refused
from support.quantizing import FAST, write_photos
from zsseg_rt import ArgumentError, Bundle, Engine, EngineConfig
from zsseg_rt.backends._openvino import BACKEND, narrow_layers
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.export.quantized.bundle import quantize_bundle
from zsseg_rt.onnx.reader import map_file, quantised_layers

STORED = Path(__file__).parents[1] / "bundles" / "v1"
INT8 = EngineConfig(device="cpu", precision="int8", use_cache=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def layers_in_int8(bundle):
    """By graph: how many layers the file promises, and how many OpenVINO compiled for INT8."""
    found = {}
    for name, held in bundle.graphs.items():
        if "int8" not in held:
            continue
        path = bundle.open_path(held["int8"])
        options = BackendOptions(dynamic_axes={"classes": (1, 8, 64), "regions": (1, 2, 4)})
        graph = BACKEND.load(path, device="cpu", precision="int8", options=options)
        found[name] = quantised_layers(map_file(path)), narrow_layers(graph.open_model())
        graph.close()
    return found


@needs_vnni
@pytest.mark.parametrize(
    ("family", "promised"),
    [
        ("proposals", {"region_encoder": 10}),
        ("descriptor", {"image_encoder": 5, "decoder": 6}),
        ("aggregation", {"image_encoder": 35, "head": 38}),
    ],
)
def test_the_heavy_graphs_of_each_family(family, promised, photos, tmp_path):
    bundle, out = Bundle.load(STORED / f"{family}.zsseg"), tmp_path / "small.zsseg"
    quantize_bundle(bundle, out, photos, list(bundle.text_bank.names), FAST)
    made = Bundle.load(out)
    assert layers_in_int8(made) == {name: (n, n) for name, n in promised.items()}
    with Engine(made, INT8) as engine:
        assert engine.precision == "int8"
        assert engine.self_check().passed
        engine.set_classes(list(bundle.text_bank.names))
        assert engine.segment(np.zeros((40, 60, 3), np.uint8)).labels.shape == (40, 60)


@needs_vnni
def test_a_graph_without_layers_in_int8_runs_as_usual(photos, tmp_path):
    bundle, out = Bundle.load(STORED / "descriptor.zsseg"), tmp_path / "small.zsseg"
    quantize_bundle(bundle, out, photos, list(bundle.text_bank.names), FAST)
    made = Bundle.load(out)
    half = replace(made, graphs=made.graphs | {"decoder": bundle.graphs["decoder"]})
    assert half.asked_of("image_encoder", "int8") == "int8"
    assert half.asked_of("decoder", "int8") == "auto"
    assert bundle.asked_of("decoder", "int8") == "int8"  # nothing is in INT8: refused, as before
    with Engine(half, INT8) as engine:
        assert engine.precision == "int8"
        assert engine.self_check().passed


@needs_vnni
@pytest.mark.nightly
def test_the_head_that_the_classes_use(photos, tmp_path):
    torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
    from support import golden_cat_seg
    from zsseg_rt.export import export_bundle

    names = [f"name {index}" for index in range(40)]
    rows = np.random.default_rng(0).normal(size=(40, golden_cat_seg.TINY["embed"]))
    with torch.no_grad():
        model = golden_cat_seg.tiny_model(padding=256)
        wide = export_bundle(
            model, tmp_path / "wide.zsseg", precisions=("float32",), text_encoder=None,
            text_bank=(names, rows.astype(np.float32)),
        )  # fmt: skip
    for count, promised in (
        (5, {"image_encoder": 35, "head": 38}),
        (40, {"image_encoder": 35, "head_1": 15, "head_2": 17, "head_3": 6}),
    ):
        out = tmp_path / f"for_{count}.zsseg"
        settings = replace(FAST, min_agreement=0.01)  # random weights: here only the layers matter
        quantize_bundle(Bundle.load(wide), out, photos, names[:count], settings)
        made = Bundle.load(out)
        assert layers_in_int8(made) == {name: (n, n) for name, n in promised.items()}
        with Engine(made, INT8) as engine:
            assert all(one.passed for one in engine.self_check().stages if one.stage != "labels")
            for named in (5, 40):
                engine.set_classes(names[:named])
                engine.segment(np.zeros((96, 96, 3), np.uint8))


def test_hard_segments_are_refused(photos, tmp_path):
    bundle = Bundle.load(STORED / "segment_tokens.zsseg")
    with refused(ArgumentError, "bundle", "segment_tokens"):
        quantize_bundle(bundle, tmp_path / "x.zsseg", photos, ["sky"], FAST)


@needs_vnni
@pytest.mark.nightly
def test_clip_rc_in_int8(photos, tmp_path):
    torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
    from support import tiny
    from zsseg_rt.export import export_bundle

    names = [f"name {index}" for index in range(7)]
    with torch.no_grad():
        wide = export_bundle(
            tiny.clip_rc_model(), tmp_path / "wide.zsseg", precisions=("float32",),
            templates=["a {}"], text_encoder=None, class_names=names,
            text_bank=(names, tiny.text_embeds(7, 32).numpy()),
        )  # fmt: skip
    out = tmp_path / "small.zsseg"
    quantize_bundle(Bundle.load(wide), out, photos, names[2:4], FAST)
    made = Bundle.load(out)
    assert layers_in_int8(made) == {"image_encoder": (29, 29), "decoder": (24, 24)}
    with Engine(made, INT8) as engine:
        assert engine.self_check().passed
