"""Which tests run: all but the nightly ones; with ``--fast`` a cover of operations' grids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, groupby
from typing import Any

import pytest

# No folder is named torch: it would pass for the package where that is not installed.
ROOMS = ("unit", "torch_side", "system", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this project's tests; tools/test.sh passes them on."""
    group = parser.getgroup("zsseg_rt")
    group.addoption("--nightly", action="store_true", help="also run tests marked nightly")
    group.addoption(
        "--fast",
        action="store_true",
        help="run no test that needs CUDA, and of an operation's grid only cases that "
        "together hold every pair of values",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what the options leave out; a test named by ``FILE::TEST`` always runs.

    Each test has its folder's name as a marker.
    """
    for item in items:
        if item.path.parent.name in ROOMS:
            item.add_marker(item.path.parent.name)
    picked = list(items)
    if not config.getoption("--nightly") and not any("::" in name for name in config.args):
        picked = [item for item in picked if item.get_closest_marker("nightly") is None]
    if config.getoption("--fast"):
        picked = list(_covering(picked))
    if len(picked) < len(items):
        kept = set(picked)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = picked


def _covering(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    on_cpu = [item for item in items if item.get_closest_marker("needs_cuda") is None]
    for _, cases in groupby(on_cpu, lambda item: item.nodeid.partition("[")[0]):
        whole: list[Any] = list(cases)
        is_grid = whole[0].path.name.startswith("test_ops_") and hasattr(whole[0], "callspec")
        if is_grid:
            # The parameters' values are the same objects in every case.
            grid = [{k: id(v) for k, v in case.callspec.params.items()} for case in whole]
            kept = set(pairwise(grid))
            yield from (case for index, case in enumerate(whole) if index in kept)
        else:
            yield from whole


def pairwise(cases: list[dict[str, int]]) -> list[int]:
    """Indices of few cases in which each pair of two arguments' values occurs that occurs at all.

    A case is a number for each argument's value. Of one argument every value is kept.
    """
    pairs = [
        set(combinations(sorted(case.items()), 2)) or set(combinations(sorted(case.items()), 1))
        for case in cases
    ]
    left, kept = set().union(*pairs), []
    while left:
        best = max(range(len(cases)), key=lambda index: len(pairs[index] & left))
        left -= pairs[best]
        kept.append(best)
    return sorted(kept)
