"""Nodes are counted by the block they are part of, and by the kind of their work."""

import pytest

from zsseg_rt.profiling.nodes import (
    OUTSIDE,
    assign_nodes,
    block_of,
    has_blocks,
    kind_of,
    sum_by,
)


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("blocks.3.mlp.c_fc", "blocks.3"), ("blocks.11/attention", "blocks.11"),
        ("layer1.0.conv1", "layer1.0"), ("decoder.layers.2.norm", "decoder.layers.2"),
        ("ln_pre", "ln_pre"), ("", "(top)"), ("attention", "(top)"),
    ],
)  # fmt: skip
def test_blocks(module, block):
    assert block_of(module) == block


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("blocks.0.qkv/Add", "FullyConnected", "linear"), ("conv1/Conv", "Convolution", "linear"),
        ("blocks.0/attention/MatMul", "MatMul", "attention"),
        ("", "ScaledDotProductAttention", "attention"),
        ("node_scaled_dot_product_attention", "Subgraph", "attention"),
        ("", "MVN", "norm"), ("ln_pre/LayerNormalization", "Subgraph", "norm"),
        ("blocks.0/Concat", "Concat", "layout"), ("", "Reorder", "layout"),
        ("blocks.0/Add", "Subgraph", "other"), ("blocks.0/Transpose", "", "layout"),
    ],
)  # fmt: skip
def test_kinds(name, kind, expected):
    assert kind_of(name, kind) == expected


def test_invented_nodes_belong_to_the_named_one_before_them():
    nodes = [("", "Reorder", 1.0), ("conv1/Conv", "Conv", 2.0), ("", "MVN", 3.0),
             ("blocks.0.qkv/Add", "FullyConnected", 4.0), ("", "Reorder", 5.0),
             ("blocks.1/MatMul + blocks.2/Add", "", 6.0)]  # fmt: skip
    rows = assign_nodes("g", nodes)
    assert [row.block for row in rows] == [
        "conv1", "conv1", "conv1", "blocks.0", "blocks.0", "blocks.1"
    ]  # fmt: skip
    assert sum_by(rows, lambda row: row.block) == {"conv1": 6.0, "blocks.0": 9.0, "blocks.1": 6.0}


def test_older_graphs_have_kinds_but_no_blocks():
    rows = assign_nodes("g", [("node_MatMul_20", "FullyConnected", 1.0), ("MVN_33", "MVN", 1.0)])
    assert [(row.block, row.kind) for row in rows] == [("", "linear"), ("", "norm")]


def test_what_lies_outside_the_nodes_belongs_to_none():
    rows = assign_nodes("g", [("conv1/Conv", "Conv", 2.0), (OUTSIDE, "", 1.0)])
    assert [(row.block, row.kind) for row in rows] == [("conv1", "linear"), (OUTSIDE, OUTSIDE)]
    assert has_blocks(rows)
    assert not has_blocks(assign_nodes("g", [("", "MVN", 2.0), (OUTSIDE, "", 1.0)]))
