"""What a report says of measurements that are given, and of which kind nodes of graphs are."""

from types import SimpleNamespace

import pytest

from support.profiling import GivenTimes
from zsseg_rt.demo import demo_bundle
from zsseg_rt.profiling.conditions import Conditions, Reading
from zsseg_rt.profiling.page import report_tables
from zsseg_rt.profiling.profiler import Profiler
from zsseg_rt.profiling.report import OUTSIDE, kind_of, node_rows
from zsseg_rt.profiling.turns import StopRule, take_turns
from zsseg_rt.profiling.worker import TurnPlan
from zsseg_rt.profiling.workload import Variant


def measured(*configs, waiting=0.0, nodes=None, **known):
    """Variants whose frames take given times, the first of them 2 ms."""
    names = [f"v{index}" for index in range(len(configs))]
    times = [[2.0, 2.01, 1.99], [3.0, 3.01, 2.99]]
    candidates = [
        GivenTimes(name, ms, waiting=waiting) for name, ms in zip(names, times, strict=False)
    ]
    stop = StopRule(max_seconds=60.0, max_rounds=20, half_width=None)
    rounds = take_turns(candidates, TurnPlan(pause_ms=0.0), stop)
    variants = tuple(
        Variant(name=name, bundle=demo_bundle("scenes"), config=config)
        for name, config in zip(names, configs, strict=True)
    )
    work = SimpleNamespace(num_classes=lambda _: 1, frame_sizes=lambda _: "1x1")
    profiler = Profiler(
        variants=variants, workload=work, source="", command="", rounds=rounds, **known
    )
    rows = [row for graph, some in (nodes or {}).items() for row in node_rows(graph, some)]
    profiler.reports["v0"].nodes = tuple(rows)
    return profiler.report()


@pytest.mark.parametrize(
    ("configs", "waiting", "noted"),
    [
        (({"num_threads": 1}, {"num_threads": 2}), 0.5, True),
        (({}, {"num_threads": 2}), 0.5, True),
        (({"num_threads": 1}, {"num_threads": 2}), 0.0, False),  # wall time is compared
        (({"num_threads": 2}, {"num_threads": 2, "precision": "float32"}), 0.5, False),
    ],
)
def test_cpu_time_of_other_numbers_of_threads_is_warned_of(configs, waiting, noted):
    report = measured(*configs, waiting=waiting)
    assert [one.difference.verdict for one in report.comparisons] == ["slower"]
    notes = [note for note in report.notes if "adds up over threads" in note]
    assert len(notes) == noted
    assert all(note.startswith("v1: ") for note in notes)


def test_a_report_has_what_the_gpu_did_also_after_ctrl_c():
    seen = Conditions(readings=(Reading(name="GPU clock", value=1.0),), notes=("it was hot",))
    report = measured({}, gpu=SimpleNamespace(conditions=lambda: seen), interrupted=True)
    assert seen.readings[0] in report.conditions.readings
    assert "it was hot" in report.notes
    assert any("interrupted" in note for note in report.notes)


def test_nodes_are_listed_by_graph_with_the_rest_last():
    nodes = {
        "image_encoder": [["blocks.0/MatMul", "MatMul", 1.0], ["blocks.0/Reshape", "", 2.0],
                          [OUTSIDE, "", 9.0]],
        "decoder": [["layers.0/MatMul", "MatMul", 5.0], [OUTSIDE, "", 6.0]],
    }  # fmt: skip
    tables = {t.title: t for t in report_tables(measured({}, nodes=nodes))}
    assert [row[:3] for row in tables["nodes of v0 by kind"].rows] == [
        ("image_encoder", "layout", "2.000"), ("image_encoder", "linear", "1.000"),
        ("image_encoder", OUTSIDE, "9.000"),
        ("decoder", "linear", "5.000"), ("decoder", OUTSIDE, "6.000"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "type_", "kind"),
    [
        ("blocks.3.mlp.c_fc/Add", "FullyConnected", "linear"),
        ("layer1.0.conv1/Conv", "Convolution", "linear"),
        ("blocks.11/attention/MatMul", "MatMul", "attention"),
        ("", "ScaledDotProductAttention", "attention"),
        ("node_scaled_dot_product_attention", "Subgraph", "attention"),
        ("MVN_33", "MVN", "norm"), ("ln_pre/LayerNormalization", "Sub", "norm"),
        ("decoder.layers.2.norm/Concat", "Concat", "layout"),
        ("", "Reorder", "layout"), ("/Transpose", "", "layout"),
        ("blocks.0/Add", "Subgraph", "other"), ("blocks.1/Reshape + blocks.2/Add", "Sub", "other"),
        (OUTSIDE, "", OUTSIDE),
    ],
)  # fmt: skip
def test_a_node_has_a_kind(name, type_, kind):
    assert kind_of(name, type_) == kind
