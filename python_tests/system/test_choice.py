"""Which tests run, which room a file belongs into, and which exported graphs are found again."""

import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

from support import rooms
from support.choice import pairwise

HERE = Path(rooms.__file__).parents[1]
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


@pytest.mark.parametrize(
    ("name", "text", "room"),
    [
        ("test_a.py", "import numpy\n", "unit"),
        ("test_a.py", "def test_a():\n    import subprocess\n", "system"),
        ("test_a.py", "from zsseg_rt.export import export_bundle\n", "torch_side"),
        ("test_a.py", "from support import tiny\n", "torch_side"),
        ("test_a.py", "from support.live_server import *\n", "system"),
        ("test_a.py", "def test_a(zegclip_bundle): pass\n", "torch_side"),
        ("test_a.py", "import pytest\nx = pytest.importorskip('torch')\n", "torch_side"),
        ("test_a.py", "import pytest\np = pytest.mark.usefixtures('v4l2_driver')\n", "system"),
        ("test_cuda_a.py", "", "cuda"),
        ("test_training_a.py", "import subprocess\n", "torch_side"),
    ],
)
def test_a_file_s_room_follows_what_it_imports_and_starts(tmp_path, name, text, room):
    (tmp_path / name).write_text(text)
    assert rooms.room_of(tmp_path / name) == room


ELSEWHERE = {
    "test_api_docs.py": "unit",  # torch is asked of one of its pages
    "test_import_rules.py": "system",
    "test_plan_builds.py": "system",  # its processes are the product's own
}


def test_each_file_stands_in_its_room():
    files = [path for path in HERE.rglob("test_*.py") if path.parent.parent == HERE]
    assert len(files) > 200
    assert not list(HERE.glob("test_*.py"))
    found = {path.name: path.parent.name for path in files}
    assert len(found) == len(files)  # no name twice
    assert found == {p.name: ELSEWHERE.get(p.name) or rooms.room_of(p) for p in files}
