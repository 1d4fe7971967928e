"""Where the nodes of a graph belong: to which block of the network, and to which kind of work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from zsseg_rt.backends.base import OUTSIDE_NODES
from zsseg_rt.profiling.report import NodeRow

K = TypeVar("K")
OUTSIDE = OUTSIDE_NODES
"""Block and kind of what a run takes beyond its nodes."""
_LINEAR = ("fullyconnected", "matmul", "gemm", "conv", "linear")
_ATTENTION = ("attention", "sdpa", "mha")
_NORM = ("norm", "mvn", "rms")
_LAYOUT = (
    "reorder", "transpose", "reshape", "concat", "split", "slice", "gather", "pad", "expand",
    "broadcast", "squeeze", "convert", "cast", "permute", "shuffle", "copy", "tile",
)  # fmt: skip


def assign_nodes(graph: str, nodes: Iterable[Sequence[object]]) -> list[NodeRow]:
    """Give every node of a graph its block and kind."""
    given = [(str(name), str(kind), float(str(ms))) for name, kind, ms in nodes]
    modules = [_module_of(name) for name, _, _ in given]
    first = next((module for module in modules if module is not None), None)
    rows, current = [], first
    for (name, kind, ms), module in zip(given, modules, strict=True):
        current = current if module is None else module
        block = "" if current is None else block_of(current)
        work = kind_of(name, kind)
        if name == OUTSIDE:
            block = work = OUTSIDE
        rows.append(NodeRow(graph=graph, name=name, type=kind, block=block, kind=work, ms=ms))
    return rows


def has_blocks(rows: Iterable[NodeRow]) -> bool:
    """Whether any node's block is known; of older bundles, none is."""
    return any(row.block not in ("", OUTSIDE) for row in rows)


def _module_of(name: str) -> str | None:
    """The module in a name; of nodes that were fused, as in ``a/MatMul + b/Add``, the first's."""
    first = name.split(" + ")[0]
    return first.rpartition("/")[0] if "/" in first else None


def block_of(module: str) -> str:
    """The block that a module is part of: ``blocks.3.mlp.c_fc`` belongs to ``blocks.3``.

    A module outside any numbered block is its own first part; the network itself is ``(top)``.

    Example:
        >>> block_of("blocks.3.mlp.c_fc"), block_of("layer1.0.conv1"), block_of("ln_pre")
        ('blocks.3', 'layer1.0', 'ln_pre')
    """
    path = module.removesuffix("attention").rstrip("/")
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return parts[0] or "(top)"


def kind_of(name: str, kind: str) -> str:
    """The kind of work (see :class:`NodeRow`), by the names that graph and backend give a node."""
    module, _, operation = name.lower().rpartition("/")
    if "attention" in module or _holds(kind, _ATTENTION) or _holds(operation, _ATTENTION):
        return "attention"
    words = f"{operation} {kind.lower()}"
    if _holds(kind, _LINEAR) or _holds(operation, _LINEAR):
        return "linear"
    if _holds(words, _NORM):
        return "norm"
    if _holds(kind, _LAYOUT) or (kind == "" and _holds(operation, _LAYOUT)):
        return "layout"
    return "other"


def sum_by(rows: Iterable[NodeRow], key: Callable[[NodeRow], K]) -> dict[K, float]:
    """Milliseconds of nodes by what a function says of them, in the order they came."""
    totals: dict[K, float] = defaultdict(float)
    for row in rows:
        totals[key(row)] += row.ms
    return dict(totals)


def _holds(text: str, words: Sequence[str]) -> bool:
    lowered = text.lower()
    return any(word in lowered for word in words)
