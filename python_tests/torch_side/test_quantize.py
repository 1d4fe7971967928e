"""Bundles in INT8 and FP8: written where they agree with float32 on pictures, else refused."""

import json
import shutil
import signal
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx.reference import ReferenceEvaluator

from support.command_line import run
from support.cpus import needs_vnni, stand_in
from support.errors import refused
from tools.scenes import SceneDataset, write_folder
from zsseg_rt import (
    ArgumentError,
    BackendError,
    Bundle,
    BundleError,
    Engine,
    EngineConfig,
    PrecisionNotApplied,
    SourceError,
)
from zsseg_rt.backends import _tensorrt
from zsseg_rt.backends._openvino import BACKEND, narrow_layers
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.bundles.specs import MaskLoss
from zsseg_rt.demo import demo_classes
from zsseg_rt.evaluation.evaluate import EngineSegmenter
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.export.graph_files import describe_graph
from zsseg_rt.export.quantized import bundle as quantizing
from zsseg_rt.export.quantized.bundle import (
    Agreement,
    QuantizeSettings,
    choose_images,
    quantize_bundle,
)
from zsseg_rt.export.quantized.layers import (
    FORMATS,
    Range,
    TensorStats,
    find_groups,
    quantised_graph,
    read_plain,
)
from zsseg_rt.onnx.arrays import run_network
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.reader import map_file, quantised_layers
from zsseg_rt.onnx.writer import save_onnx
from zsseg_rt.text.class_names import split_synonyms

STORED = Path(__file__).parents[1] / "bundles" / "v1"
INT8 = EngineConfig(device="cpu", precision="int8", use_cache=False)


class BlankScenes(SceneDataset):
    """Nothing of them is annotated."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return replace(sample, labels=np.full_like(sample.labels, self.ignore_label))


def few_scenes(count, kind=SceneDataset):
    return kind("val", length=count)


def quantise(out, photos, *, bundle=None, names=None, dataset=None, **settings):
    names = names or (split_synonyms(dataset.class_names) if dataset else demo_classes("scenes"))
    bundle, settings = bundle or Bundle.demo("scenes"), QuantizeSettings(**settings)
    return quantize_bundle(bundle, out, photos, names, settings, dataset=dataset)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photos"), {"val": 8}) / "images/val"


@pytest.fixture(scope="module")
def quantised_in(photos, tmp_path_factory):
    """The demo in 8 bits, once for each format, and the report."""

    @cache
    def make(precision):
        out = tmp_path_factory.mktemp("quantised") / "a.zsseg"
        report = quantise(out, photos, precision=precision)
        return Bundle.load(out), report

    return make


@needs_vnni
def test_a_bundle_holds_what_was_measured_and_runs_in_int8(quantised_in, monkeypatch):
    bundle, report = quantised_in("int8")
    spec = bundle.quantization["int8"]
    assert spec == report.spec
    assert spec.passed
    assert spec.agreement >= 0.98
    assert len(spec.photos) == len(set(spec.photos)) == 8
    assert spec.measured_photos == 2
    kinds = {kind for layers in spec.layers.values() for kind in layers.values()}
    assert kinds == {"int8"}
    assert set(spec.layers) == {"image_encoder", "decoder"}
    assert len(spec.layers["image_encoder"]) == 25
    bundle.verify()
    assert layers_in_int8(bundle) == {"image_encoder": (37, 37), "decoder": (12, 12)}
    with Engine(bundle, INT8) as engine:
        assert engine.precision == "int8"
        check = engine.self_check()
    assert check.passed
    # Measured on a scene: 0.3 % to 5.4 %, by stage; accepted is twice that.
    assert max(one.tolerance for one in check.stages) <= 0.2
    path = bundle.open_path(bundle.graph("decoder", "int8"))
    monkeypatch.setattr("zsseg_rt.backends._openvino.narrow_layers", lambda compiled: 0)
    with refused(PrecisionNotApplied, "precision", "12", "0"):
        BACKEND.load(path, device="cpu", precision="int8", options=BackendOptions())


@needs_vnni
def test_one_wrong_scale_fails_the_self_check(quantised_in, tmp_path):
    bundle, _ = quantised_in("int8")
    folder = tmp_path / "wrong.zsseg"
    shutil.copytree(bundle.path, folder)
    path = folder / "decoder.int8.onnx"
    model = onnx.load(path)
    wrong = [w for w in model.graph.initializer if ".weight.scale" in w.name][1]
    wrong.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(wrong), wrong.name))
    onnx.save(model, path)
    graphs = bundle.graphs["decoder"] | {"int8": describe_graph(path, folder)}
    altered = replace(bundle, path=folder, graphs=bundle.graphs | {"decoder": graphs})
    with Engine(altered, INT8) as engine:
        assert not engine.self_check().passed


@needs_vnni
def test_auto_takes_int8_only_behind_a_gate(quantised_in):
    bundle, _ = quantised_in("int8")
    config = EngineConfig(device="cpu", backend="openvino", use_cache=False)
    specs = [replace(bundle.quantization["int8"], agreement=x) for x in (0.98, 0.5, float("nan"))]
    for stored in ({"int8": specs[0]}, {"int8": specs[1]}, {"int8": specs[2]}, {}):
        with Engine(replace(bundle, quantization=stored), config) as engine:
            assert (engine.precision == "int8") == (stored == {"int8": specs[0]})


@needs_vnni
def test_below_the_gate_only_the_report_is_written(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing, "measure", lambda *_: Agreement(clear=0.5, everywhere=0.4))
    report, out = tmp_path / "report.json", tmp_path / "new.zsseg"
    options = ("--photos", photos, "--out", out, "--json", report)
    assert run("quantize", "demo-scenes", *options) == 3
    assert [path.name for path in tmp_path.iterdir()] == [report.name]
    written = json.loads(report.read_text())
    assert written["path"] is None
    assert written["spec"]["agreement"] == 0.5
    assert "float16" in written["spec"]["layers"]["decoder"].values()


@needs_vnni
def test_the_worst_layers_stay_in_float16(photos, tmp_path, monkeypatch):
    def measure(bundle, precision, reference):
        """Agrees unless the decoder's first layer is quantised."""
        entry = bundle.graphs["decoder"].get("int8")
        narrow = 0 if entry is None else quantised_layers(map_file(bundle.path / entry.file))
        return Agreement(clear=0.9 if narrow in (1, 12) else 1.0, everywhere=0.9)

    monkeypatch.setattr(quantizing, "measure", measure)
    out = tmp_path / "new.zsseg"
    report = quantise(out, photos)
    kept = [kind for one in report.spec.layers.values() for kind in one.values()]
    assert report.spec.passed
    assert kept.count("float16") == 1
    assert quantised_layers(map_file(out / "decoder.int8.onnx")) == 7
    with Engine(out, INT8) as engine:
        assert engine.precision == "int8"


@needs_vnni
@pytest.mark.nightly
def test_a_graph_may_lose_all_its_layers(quantised_in, photos, tmp_path, monkeypatch):
    bundle, _ = quantised_in("int8")  # whose graphs are in INT8: one of them must not stay
    names = ("image_encoder", "decoder")

    def measure(bundle, precision, reference):
        clear = 0.9 if all("int8" in bundle.graphs[name] for name in names) else 1.0
        return Agreement(clear=clear, everywhere=0.9)

    monkeypatch.setattr(quantizing, "measure", measure)
    out = tmp_path / "again.zsseg"
    quantise(out, photos, bundle=bundle)
    again = Bundle.load(out)
    (lost,) = [name for name in names if "int8" not in again.graphs[name]]
    assert not (out / f"{lost}.int8.onnx").exists()
    with Engine(out, INT8) as engine:
        assert engine.precision == "int8"
        assert engine.self_check().passed
    with refused(PrecisionNotApplied, "precision"):
        Engine(Bundle.demo("scenes"), INT8)  # where no graph is in INT8


def test_the_command_prints_what_info_repeats(photos, tmp_path, capsys):
    out = tmp_path / "new.zsseg"
    options = ("--photos", photos, "--out", out, "--precision", "fp8")
    assert run("quantize", "demo-scenes", *options) == 0  # at the usual gate: 98 %
    shown = capsys.readouterr().out
    assert "blocks.0.q_proj" in shown
    spec = Bundle.load(out).quantization["fp8"]
    assert spec.agreement >= spec.min_agreement == 0.98
    assert f"{spec.agreement:.2%} of clear cells" in shown
    assert run("info", out) == 0
    groups = len(spec.layers["image_encoder"]) + len(spec.layers["decoder"])
    printed = capsys.readouterr().out
    assert f"fp8: {groups} of {groups} groups of layers, agreement with float32 " in printed
    assert f"{spec.agreement:.2%}" in printed
    with refused(PrecisionNotApplied, "precision"):
        Engine(out, EngineConfig(device="cpu", precision="fp8"))


@pytest.mark.usefixtures("vnni")
def test_what_cannot_be_quantised_is_refused(photos, quantised_in, tmp_path):
    demo, out, data = Bundle.demo("scenes"), tmp_path / "new.zsseg", few_scenes(8)
    empty, few, broken = (tmp_path / name for name in ("empty", "few", "broken"))
    empty.mkdir()
    few.mkdir()
    shutil.copy(photos / "000000.png", few)
    shutil.copytree(photos, broken)
    for name in ("000003.png", "000005.png"):
        (broken / name).write_bytes((photos / name).read_bytes()[:40])
    narrow = {name: {"int8": row["float32"]} for name, row in demo.graphs.items()}
    stored = quantised_in("fp8")[0]
    already = {
        name: {"float32": row.get("fp8", row["float32"])} for name, row in stored.graphs.items()
    }
    segments = Bundle.load(STORED / "segment_tokens.zsseg")  # whose segments are hard
    masks = {"photos": None, "dataset": data}
    for error, words, changes in (
        (SourceError, (None,), {"photos": empty}),
        (ArgumentError, ("photos", "8", "1"), {"photos": few}),
        (SourceError, (None, "000003.png", "000005.png"), {"photos": broken}),
        (ArgumentError, ("bundle",), {"bundle": replace(demo, family="proposals")}),
        (ArgumentError, ("bundle", "segment_tokens"), {"bundle": segments}),
        (PrecisionNotApplied, ("precision",), {"bundle": replace(demo, graphs=narrow)}),
        (ArgumentError, ("bundle",), {"bundle": replace(stored, graphs=already)}),
        (ArgumentError, ("class_names", "two", "1"), {"names": ["sky"]}),
        (ArgumentError, ("class_names", "1"), masks | {"names": ["sky"]}),
        (ArgumentError, ("dataset", "8", "7"), masks | {"dataset": few_scenes(7)}),
        (ArgumentError, ("dataset", "class"), masks | {"dataset": few_scenes(8, BlankScenes)}),
        (ArgumentError, ("photos", "neither"), {"photos": None}),
        (ArgumentError, ("precision",), {"precision": "int4"}),
        (ArgumentError, ("min_agreement",), {"min_agreement": 0.0}),
        (ArgumentError, ("max_miou_loss",), {"max_miou_loss": -1.0}),
    ):
        with refused(error, *words):
            quantise(out, **({"photos": photos} | changes))
    assert not out.exists()


def test_a_layer_that_reads_zeros_stays_as_it_is_and_unfit_activations_are_refused(
    photos, tmp_path, monkeypatch
):
    take_in, stats, factors = TensorStats.add, [], {}

    def add(one, values, **how):
        stats.append(one)
        take_in(one, values * factors.get(one is stats[0], 1.0), **how)

    monkeypatch.setattr(TensorStats, "add", add)
    for factor, words in ((0.0, ("zeros",)), (1e6, ("65504", "float16"))):
        factors = {True: factor, False: factor}
        with refused(ArgumentError, "photos", *words):
            quantise(tmp_path / "x.zsseg", photos, precision="fp8")
        assert not list(tmp_path.iterdir())
    stats, factors = [], {True: 0.0}
    quantise(tmp_path / "x.zsseg", photos, precision="fp8")
    layers = Bundle.load(tmp_path / "x.zsseg").quantization["fp8"].layers
    kinds = [kind for one in layers.values() for kind in one.values()]
    assert kinds.count("float16") == 1


def test_e4m3_and_the_emulated_graph_round_as_onnx_does():
    kind, values = FORMATS["fp8"], np.random.default_rng(0).normal(0, 60, 500).astype(np.float32)
    values[:20] /= 4000  # subnormal ones
    values[20:23] = (448, -15.9, 0)  # the largest, one that reaches the next power, none
    bits = kind.weight(values, 1.0).array
    stored = onnx.helper.make_tensor("x", 17, bits.shape, bits.tobytes(), raw=True)
    theirs = onnx.numpy_helper.to_array(stored).astype(np.float32)
    np.testing.assert_array_equal(kind.rounded(values, 1.0), theirs)
    with_onnx = onnx.helper.make_tensor("x", 17, values.shape, values.tolist())
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(with_onnx).astype(np.float32), theirs)
    graph, values = Graph(), values[None]
    weight = 7 * np.eye(500, dtype=np.float32)  # whose scale is a power of two
    graph.output("y", graph.matmul(graph.input("x", values.shape), weight))
    network = graph.network()
    ranges = {group: Range(0.5, 0.0) for group in find_groups(network)}
    emulated = quantised_graph(network, ranges, kind, emulated=True)
    result = run_network(emulated, {"x": values})["y"]
    np.testing.assert_array_equal(result, 7 * kind.rounded(values, 0.5))


def build_plan(path, precision, capability):
    axes = {"classes": (1, 8, 64), "regions": (1, 2, 4)}
    options = BackendOptions(compute_capability=capability, dynamic_axes=axes)
    return _tensorrt.BACKEND.build_plan(path, precision=precision, options=options).report


@needs_vnni
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("precision", "capabilities"), [("int8", ("8.6", "12.0")), ("fp8", ("8.9", "12.0"))]
)
def test_plans_hold_every_promised_layer(quantised_in, precision, capabilities, monkeypatch):
    out = quantised_in(precision)[0].path
    for name, promised in (("image_encoder", 37), ("decoder", 12)):
        for capability in capabilities:
            report = build_plan(out / f"{name}.{precision}.onnx", precision, capability)
            assert (report["precision"], report["narrow_layers"]) == (precision, promised)
    if precision == "fp8":
        with refused(PrecisionNotApplied, "precision", "8.6"):
            build_plan(out / "decoder.fp8.onnx", precision, "8.6")
        monkeypatch.setattr("zsseg_rt.backends._tensorrt.COMPUTE_LAYERS", ("CONVOLUTION",))
        with refused(PrecisionNotApplied, "precision", "12", "0"):
            build_plan(out / "decoder.fp8.onnx", precision, "8.9")


# --- which graphs of each family are quantised ----------------------------------------------------


def layers_in_int8(bundle):
    """By graph: how many layers the file promises, and how many OpenVINO compiled for INT8."""
    counts = {}
    for name, row in bundle.graphs.items():
        if "int8" not in row:
            continue
        path = bundle.open_path(row["int8"])
        options = BackendOptions(dynamic_axes={"classes": (1, 8, 64), "regions": (1, 2, 4)})
        graph = BACKEND.load(path, device="cpu", precision="int8", options=options)
        counts[name] = quantised_layers(map_file(path)), narrow_layers(graph.open_model())
        graph.close()
    return counts


@needs_vnni
@pytest.mark.parametrize(
    ("family", "promised"),
    [("proposals", {"region_encoder": 10}), ("aggregation", {"image_encoder": 35, "head": 38})],
)
def test_the_heavy_graphs_of_each_family(family, promised, photos, tmp_path):
    bundle, out = Bundle.load(STORED / f"{family}.zsseg"), tmp_path / "small.zsseg"
    quantise(out, photos, bundle=bundle, names=list(bundle.text_bank.names))
    small = Bundle.load(out)
    assert layers_in_int8(small) == {name: (n, n) for name, n in promised.items()}
    with Engine(small, INT8) as engine:
        assert engine.precision == "int8"
        assert engine.self_check().passed
        engine.set_classes(list(bundle.text_bank.names))
        assert engine.segment(np.zeros((40, 60, 3), np.uint8)).labels.shape == (40, 60)


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
    # random weights: here only the layers matter
    out, more = tmp_path / "small.zsseg", {"bundle": Bundle.load(wide), "min_agreement": 0.01}
    quantise(out, photos, names=names, **more)
    promised = {"image_encoder": 35, "head_1": 15, "head_2": 17, "head_3": 6}
    assert layers_in_int8(Bundle.load(out)) == {name: (n, n) for name, n in promised.items()}
    with Engine(out, INT8) as engine:
        assert all(one.passed for one in engine.self_check().stages if one.stage != "labels")
        for named in (5, 40):  # which takes another head
            engine.set_classes(names[:named])
            engine.segment(np.zeros((96, 96, 3), np.uint8))


# --- where masks are given: mIoU of all, seen and unseen classes ----------------------------------


def miou(bundle, precision, loaders, dataset):
    """Measured apart from the code under test: an engine as users open it, picture by picture."""
    counts = ConfusionMatrix(len(dataset.class_names), ignore_label=dataset.ignore_label)
    with Engine(bundle, EngineConfig(device="cpu", precision=precision, use_cache=False)) as engine:
        segmenter = EngineSegmenter(engine, dataset.class_names)
        for sample in (load() for load in loaders):
            counts.update(sample.labels, segmenter.segment(sample.image))
    scores = score(counts.counts, dataset.seen)
    present, seen = scores.true_pixels > 0, np.isin(np.arange(len(scores.iou)), dataset.seen)
    groups = {"mIoU": present, "mIoU(S)": present & seen, "mIoU(U)": present & ~seen}
    return {name: 100 * scores.iou[group].mean() for name, group in groups.items()}


@needs_vnni
def test_a_bundle_holds_what_it_loses_on_masks(photos, tmp_path, capsys):
    data, out = few_scenes(16), tmp_path / "small.zsseg"
    report = quantise(out, None, dataset=data)
    bundle = Bundle.load(out)
    spec, measured = bundle.quantization["int8"], choose_images(None, data).measured
    assert spec == report.spec
    assert spec.measured_photos == len(measured) == 4
    assert len(set(spec.photos)) == 16
    masks = spec.masks
    assert masks.float32 == pytest.approx(miou(bundle, "float32", measured, data), abs=1e-3)
    assert masks.narrow == pytest.approx(miou(bundle, "int8", measured, data), abs=1e-3)
    assert masks.lost["mIoU"] <= masks.most == 0.5
    assert run("info", out) == 0
    shown = f"mIoU {masks.float32['mIoU']:.2f} -> {masks.narrow['mIoU']:.2f}"
    assert shown in capsys.readouterr().out
    both = choose_images(photos, few_scenes(3))  # photos give ranges, the data set figures
    assert {load().labels.size > 0 for load in both.measured} == {True}
    assert {load().labels.size > 0 for load in both.ranged} == {False}
    assert (len(both.ranged), len(both.measured)) == (8, 3)


def test_unseen_classes_may_not_lose_more_than_seen_ones():
    whole, nan = {"mIoU": 50.0, "mIoU(S)": 60.0, "mIoU(U)": 30.0}, float("nan")
    for lost, passes in (
        ((0.5, 0.5, 1.0), True),
        ((-1.0, -1.0, -0.6), True),
        ((0.51, 0.5, 0.5), False),
        ((0.4, 0.1, 0.7), False),
        ((nan, 0.0, 0.0), False),
        ((0.0, 0.0, nan), False),
        ((0.4,), True),  # where all classes were seen
    ):
        narrow = {name: whole[name] - less for name, less in zip(whole, lost, strict=False)}
        float32 = {name: whole[name] for name in narrow}
        assert MaskLoss(dataset="d", float32=float32, narrow=narrow, most=0.5).passed == passes


@needs_vnni
def test_a_bundle_is_written_where_few_points_are_lost(tmp_path, monkeypatch):
    def measure(bundle, precision, reference):
        lower = {name: value - 0.6 for name, value in reference.miou.items()}
        return Agreement(clear=1.0, everywhere=0.9, miou=lower)

    monkeypatch.setattr(quantizing, "measure", measure)
    data, out = few_scenes(8), tmp_path / "new.zsseg"
    for most in (0.5, 0.7):
        report = quantise(out, None, dataset=data, max_miou_loss=most)
        assert report.spec.passed == out.exists() == (most == 0.7)
        assert report.spec.masks.lost["mIoU"] == pytest.approx(0.6)
    assert Bundle.load(out).quantization["int8"].masks.most == 0.7
    written = json.loads((out / "bundle.json").read_text())
    del written["quantization"]["int8"]["masks"]["narrow"]["mIoU"]
    (out / "bundle.json").write_text(json.dumps(written))
    with refused(BundleError, None, "narrow", "mIoU"):
        Bundle.load(out)


# --- graphs of old operator sets, places, signals ---


def save_old(path, opset, *lines):
    """A graph from x [3, 4] to z, of an old operator set."""
    nodes, opset = "\n".join(lines), f'ir_version: 8, opset_import: ["": {opset}]'
    text = f"<{opset}> g (float[3, 4] x) => (float[3, 8] z) {{ {nodes} }}"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_an_old_operator_set_computes_the_same_or_is_refused(tmp_path):
    nodes = [
        "mean = ReduceMean <axes = [1], keepdims = 0> (x)",
        "wide = Unsqueeze <axes = [1]> (mean)",
        "low = Sub (x, wide)",
        "soft = Softmax <axis = 1> (low)",
        "a, b = Split <axis = 1> (soft)",
        "c, d = Split <axis = 1, split = [1, 3]> (low)",
        "z = Concat <axis = 1> (a, b, c, d)",
    ]
    old, new = save_old(tmp_path / "old.onnx", 12, *nodes), tmp_path / "new.onnx"
    save_onnx(read_plain(old), "g", new)
    onnx.checker.check_model(onnx.load(new), full_check=True)
    x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    expected, actual = (ReferenceEvaluator(str(path)).run(None, {"x": x}) for path in (old, new))
    np.testing.assert_array_equal(actual, expected)
    nodes[3] = "soft = Softmax <axis = 0> (low)"
    with refused(ArgumentError, "bundle", "12", "old.onnx", "Softmax"):
        read_plain(save_old(old, 12, *nodes))
    twice = "z = Concat <axis = 1> (x, x)"
    assert read_plain(save_old(old, 17, twice)).opset == 20
    assert read_plain(save_old(old, 21, twice)).opset == 21
    with refused(BackendError, None, "17", "old.onnx", "NoSuchOperator"):
        read_plain(save_old(old, 17, "z = NoSuchOperator (x)"))


def test_processors_and_the_place_are_checked_first(tmp_path, capsys, monkeypatch):
    gpu = SimpleNamespace(compute_capability="8.6", index=0)
    monkeypatch.setattr(_tensorrt, "open_gpu", lambda device: gpu)
    fp8 = {"device": "cuda:0", "precision": "fp8", "options": BackendOptions()}
    with refused(PrecisionNotApplied, "precision", "8.9", "8.6"):
        _tensorrt.BACKEND.load(tmp_path / "x.onnx", **fp8)
    stand_in(monkeypatch, "avx2", computes=True)
    command = ("quantize", "demo-scenes", "--photos", tmp_path / "gone", "--out")
    assert run(*command, tmp_path / "x.zsseg") == 4
    error = capsys.readouterr().err
    assert error.startswith("zsseg-rt: --precision: expected a CPU with VNNI, AMX")
    assert error.count("\n") == 1
    (tmp_path / "taken.zsseg").mkdir()
    (tmp_path / "file").touch()
    for out in ("taken.zsseg", "no_ending", "file/x.zsseg"):
        assert run(*command, tmp_path / out, "--precision", "fp8") == 1
        assert "gone" not in capsys.readouterr().err
    command = ("quantize", "demo-scenes", "--root", tmp_path, "--out", tmp_path / "x.zsseg")
    assert run(*command, "--precision", "fp8") == 1
    assert capsys.readouterr().err.startswith("zsseg-rt: --dataset: expected one of ade20k, ")


def test_an_interrupted_command_leaves_nothing(photos, tmp_path, monkeypatch, capsys):
    scratch, place, there = tmp_path / "scratch", tmp_path / "out", []
    scratch.mkdir()
    place.mkdir()

    def interrupt(*_):
        there.extend(scratch.glob(".quantize-*/*/*.onnx"))
        signal.raise_signal(signal.SIGTERM)  # which is as Ctrl-C

    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(quantizing, "measure", interrupt)
    written = ("--out", place / "x.zsseg", "--json", place / "report.json")
    assert run("quantize", "demo-scenes", "--photos", photos, "--precision", "fp8", *written) == 1
    message = "zsseg-rt: interrupted; nothing half-written was left"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert there
    assert not [*place.iterdir(), *scratch.iterdir()]
