"""Which tests run, and which room a file belongs into."""

import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

from support.choice import ROOMS, pairwise

HERE = Path(__file__).parents[1]
CONFTEST = "from support.choice import pytest_addoption, pytest_collection_modifyitems\n"
CASES = """
import pytest
@pytest.mark.nightly
def test_slow(): pass
@pytest.mark.needs_cuda
def test_gpu(): pass
@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 2, 3])
@pytest.mark.parametrize("c", [1, 2, 3])
def test_grid(a, b, c): pass
"""


def collected(folder, *arguments):
    """Names of the tests that would run."""
    (folder / "conftest.py").write_text(CONFTEST)
    for name in ("test_ops_some.py", "test_other.py"):
        (folder / name).write_text(CASES)
    call = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    call += [*arguments, f"--rootdir={folder}", "-c", "/dev/null"]
    done = subprocess.run(
        call, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": str(HERE), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_nightly_tests_run_when_asked_for_or_named(tmp_path):
    ordinary = collected(tmp_path)
    assert len(ordinary) == 2 * 28
    assert not [name for name in ordinary if "test_slow" in name]
    assert len(collected(tmp_path, "--nightly")) == 2 * 29
    assert collected(tmp_path, "test_other.py::test_slow") == ["test_other.py::test_slow"]


def test_fast_cuts_grids_of_operations_and_leaves_out_cuda(tmp_path):
    fast = collected(tmp_path, "--fast")
    assert not [name for name in fast if "test_gpu" in name or "test_slow" in name]
    of_operation = [name for name in fast if name.startswith("test_ops_")]
    assert 9 <= len(of_operation) <= 12
    assert len(fast) - len(of_operation) == 27


def pairs(cases):
    return {pair for case in cases for pair in combinations(sorted(case.items()), 2)}


def test_every_pair_of_values_is_kept():
    names = "abcde"
    cases = [dict(zip(names, row, strict=True)) for row in product(range(4), repeat=5)]
    cases = [case for case in cases if case["a"] != case["b"]]  # a grid with holes
    kept = pairwise(cases)
    assert pairs(cases[index] for index in kept) == pairs(cases)
    assert len(kept) < len(cases) / 20
    assert pairwise([{"a": 0}, {"a": 1}]) == [0, 1]


NOT_IN_UNIT = re.compile(
    r"^\s*(?:import|from) (?:accelerate|fastapi|gi|httpx|multiprocessing|onnx|open_clip|playwright"
    r"|ray|socket|subprocess|torch|torchvision|uvicorn|websockets"
    r"|zsseg_rt\.(?:export|models|server|torch_files|training))\b",
    re.MULTILINE,
)


def test_each_file_stands_in_a_room_and_unit_tests_need_no_torch_and_no_process():
    files = [path for room in ROOMS for path in (HERE / room).glob("test_*.py")]
    assert sorted(files) == sorted(HERE.rglob("test_*.py"))
    assert len({path.name for path in files}) == len(files) > 150  # no name twice
    for path in (HERE / "unit").glob("test_*.py"):
        assert not NOT_IN_UNIT.search(path.read_text(encoding="utf-8")), path.name
