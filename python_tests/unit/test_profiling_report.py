"""What a report says of measurements that are given, and where the nodes of graphs belong."""

from types import SimpleNamespace

import pytest

from support.profiling import GivenTimes
from zsseg_rt.demo import demo_bundle
from zsseg_rt.profiling.conditions import Conditions, Reading
from zsseg_rt.profiling.page import report_tables
from zsseg_rt.profiling.profiler import Profiler
from zsseg_rt.profiling.report import OUTSIDE, assign_nodes, has_blocks
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
    rows = [row for graph, some in (nodes or {}).items() for row in assign_nodes(graph, some)]
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
    assert [row[:2] for row in tables["nodes of v0 by block"].rows] == [
        ("image_encoder", "blocks.0"), ("image_encoder", OUTSIDE),
        ("decoder", "layers.0"), ("decoder", OUTSIDE),
    ]  # fmt: skip


def test_older_bundles_have_no_table_of_blocks():
    nodes = {"image_encoder": [["node_MatMul_3", "MatMul", 1.0], [OUTSIDE, "", 9.0]]}
    titles = [t.title for t in report_tables(measured({}, nodes=nodes))]
    assert "nodes of v0 by kind" in titles
    assert "nodes of v0 by block" not in titles


@pytest.mark.parametrize(
    ("name", "type_", "block", "kind"),
    [
        ("blocks.3.mlp.c_fc/Add", "FullyConnected", "blocks.3", "linear"),
        ("layer1.0.conv1/Conv", "Convolution", "layer1.0", "linear"),
        ("blocks.11/attention/MatMul", "MatMul", "blocks.11", "attention"),
        ("", "ScaledDotProductAttention", "", "attention"),
        ("node_scaled_dot_product_attention", "Subgraph", "", "attention"),
        ("attention/MatMul", "MatMul", "(top)", "attention"),
        ("MVN_33", "MVN", "", "norm"), ("ln_pre/LayerNormalization", "Sub", "ln_pre", "norm"),
        ("decoder.layers.2.norm/Concat", "Concat", "decoder.layers.2", "layout"),
        ("", "Reorder", "", "layout"), ("/Transpose", "", "(top)", "layout"),
        ("blocks.0/Add", "Subgraph", "blocks.0", "other"),
        ("blocks.1/MatMul + blocks.2/Add", "", "blocks.1", "other"),
        (OUTSIDE, "", OUTSIDE, OUTSIDE),
    ],
)  # fmt: skip
def test_a_node_has_a_block_and_a_kind(name, type_, block, kind):
    (row,) = assign_nodes("g", [(name, type_, 1.0)])
    assert (row.block, row.kind) == (block, kind)
    assert has_blocks([row]) == (block not in ("", OUTSIDE))


def test_invented_nodes_belong_to_the_named_one_before_them():
    nodes = [("", "Reorder", 1.0), ("conv1/Conv", "Conv", 2.0), ("", "MVN", 3.0),
             ("blocks.0.qkv/Add", "FullyConnected", 4.0), ("", "Reorder", 5.0)]  # fmt: skip
    blocks = [row.block for row in assign_nodes("g", nodes)]
    assert blocks == ["conv1", "conv1", "conv1", "blocks.0", "blocks.0"]
