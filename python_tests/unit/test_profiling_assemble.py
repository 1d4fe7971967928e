"""What a report says of measurements that are given."""

from types import SimpleNamespace

import pytest

from support.profiling import GivenTimes
from zsseg_rt.demo import demo_bundle
from zsseg_rt.profiling.assemble import Measured, Request, assemble_report
from zsseg_rt.profiling.nodes import OUTSIDE, assign_nodes
from zsseg_rt.profiling.tables import report_tables
from zsseg_rt.profiling.turns import StopRule, take_turns
from zsseg_rt.profiling.worker import TurnPlan
from zsseg_rt.profiling.workload import Variant


def measured(*configs, waiting=0.0, nodes=None):
    """Variants whose frames take given times, the first of them 2 ms."""
    names = [f"v{index}" for index in range(len(configs))]
    times = [[2.0, 2.01, 1.99], [3.0, 3.01, 2.99]]
    candidates = [
        GivenTimes(name, ms, waiting=waiting) for name, ms in zip(names, times, strict=False)
    ]
    stop = StopRule(max_seconds=60.0, max_rounds=20, half_width=None)
    rounds = take_turns(candidates, TurnPlan(pause_ms=0.0), stop)
    work = SimpleNamespace(num_classes=lambda _: 1, frame_sizes=lambda _: "1x1")
    variants = tuple(
        Variant(name=name, bundle=demo_bundle("scenes"), config=config)
        for name, config in zip(names, configs, strict=True)
    )
    request = Request(variants=variants, workload=work, source="", command="")
    found = Measured(request=request, rounds=rounds)
    rows = [row for graph, some in (nodes or {}).items() for row in assign_nodes(graph, some)]
    found.reports["v0"].nodes = tuple(rows)
    return found


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
    report = assemble_report(measured(*configs, waiting=waiting))
    assert [one.difference.verdict for one in report.comparisons] == ["slower"]
    found = [note for note in report.notes if "adds up over threads" in note]
    assert len(found) == noted
    assert all(note.startswith("v1: ") for note in found)


def test_nodes_are_listed_by_graph_with_the_rest_last():
    nodes = {
        "image_encoder": [["blocks.0/MatMul", "MatMul", 1.0], ["blocks.0/Reshape", "", 2.0],
                          [OUTSIDE, "", 9.0]],
        "decoder": [["layers.0/MatMul", "MatMul", 5.0], [OUTSIDE, "", 6.0]],
    }  # fmt: skip
    tables = {t.title: t for t in report_tables(assemble_report(measured({}, nodes=nodes)))}
    by_kind = [row[:3] for row in tables["nodes of v0 by kind"].rows]
    assert by_kind == [
        ("image_encoder", "layout", "2.000"), ("image_encoder", "linear", "1.000"),
        ("image_encoder", OUTSIDE, "9.000"),
        ("decoder", "linear", "5.000"), ("decoder", OUTSIDE, "6.000"),
    ]  # fmt: skip
    by_block = [row[:2] for row in tables["nodes of v0 by block"].rows]
    assert by_block == [
        ("image_encoder", "blocks.0"), ("image_encoder", OUTSIDE),
        ("decoder", "layers.0"), ("decoder", OUTSIDE),
    ]  # fmt: skip


def test_older_bundles_have_no_table_of_blocks():
    nodes = {"image_encoder": [["node_MatMul_3", "MatMul", 1.0], [OUTSIDE, "", 9.0]]}
    titles = [t.title for t in report_tables(assemble_report(measured({}, nodes=nodes)))]
    assert "nodes of v0 by kind" in titles
    assert "nodes of v0 by block" not in titles
