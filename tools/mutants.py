"""How much of the code tests protect: change it at drawn places, and count what they notice.

A mutant is the package with one operator, bound, constant or statement changed. It is killed when a
test fails. The same seed, count and paths draw the same mutants, so that two sets of tests compare:

    python tools/mutants.py --paths 'zsseg_rt/ops/*.py' --tests python_tests/unit/test_ops_*.py
"""

from __future__ import annotations

import sys
from pathlib import Path

# Beside this file is profile.py, which must not be taken for Python's own module of that name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

ROOT = Path(__file__).parents[1]
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_BOUNDS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
_DROPPED = (ast.Assign, ast.AugAssign, ast.Raise)


@dataclass(frozen=True)
class Place:
    """A change to make: the index of a node in ``ast.walk`` of a file, and the kind of change.

    Attributes:
        path: The file, relative to the checkout.
        index: Of the node.
        kind: ``"operator"``, ``"bound"``, ``"constant"`` or ``"statement"``.
    """

    path: Path
    index: int
    kind: str


def places_of(root: Path, path: Path) -> Iterator[Place]:
    """The places of a file that a mutant may change: code of functions, but no words of errors."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    skipped = set()
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside |= {id(child) for part in node.body for child in ast.walk(part)}
        words = [node.exc] if isinstance(node, ast.Raise) else []
        words += [node.annotation] if isinstance(node, (ast.AnnAssign, ast.arg)) else []
        skipped |= {id(child) for word in words if word for child in ast.walk(word)}
    for index, node in enumerate(ast.walk(tree)):
        kind = _kind_of(node)
        if kind and id(node) in inside and id(node) not in skipped:
            yield Place(path, index, kind)


def _kind_of(node: ast.AST) -> str:
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        return "operator" if type(node.op) in _OPERATORS else ""
    if isinstance(node, ast.Compare):
        kind = type(node.ops[0])
        return "bound" if kind in _BOUNDS else "operator" if kind in _OPERATORS else ""
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        return "constant"
    dropped = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return "statement" if dropped or isinstance(node, _DROPPED) else ""


def mutate(root: Path, place: Place) -> tuple[str, str]:
    """The text of the changed file, and the change in words."""
    tree = ast.parse((root / place.path).read_text(encoding="utf-8"))
    node = list(ast.walk(tree))[place.index]
    before = copy.deepcopy(node)
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        node.op = _OPERATORS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Compare):
        node.ops[0] = (_OPERATORS | _BOUNDS)[type(node.ops[0])]()  # type: ignore[assignment]
    elif isinstance(node, ast.Constant):
        value = node.value
        node.value = not value if isinstance(value, bool) else value + 1  # type: ignore[operator]
    else:
        _replace(tree, node, ast.Pass())
    after = "pass" if place.kind == "statement" else ast.unparse(node)
    line = getattr(before, "lineno", 0)
    words = f"{place.path}:{line}: {_short(ast.unparse(before))} -> {_short(after)}"
    return ast.unparse(ast.fix_missing_locations(tree)), words


def _replace(tree: ast.AST, old: ast.AST, new: ast.stmt) -> None:
    for parent in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(parent, name, None)
            if isinstance(block, list) and old in block:
                block[block.index(old)] = ast.copy_location(new, old)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def run(tree: Path, tests: list[str], timeout: float) -> bool:
    """Whether all tests pass on a copy of the checkout; one that hangs fails."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *tests], cwd=tree, env=environment, capture_output=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def copy_checkout(to: Path) -> None:
    """Copy what git tracks or would, and the compiled core; ``shared`` is reached as before."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in [ROOT / name for name in names.splitlines()] + [*ROOT.glob("zsseg_rt/_C*.so")]:
        if path.is_file():
            place = to / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        (to.parent / "shared").symlink_to(shared)


def main() -> int:
    """Draw mutants, run tests on each and print the kill rate; 1 if tests fail without any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--paths", nargs="+", required=True, help="files or globs to change")
    parser.add_argument("--tests", nargs="+", required=True, help="test files to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=30, help="mutants to draw")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one mutant")
    options = parser.parse_args()
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "checkout"
        copy_checkout(tree)  # what happens to the checkout meanwhile changes nothing
        files = sorted({path for name in options.paths for path in tree.glob(name)})
        places = [place for path in files for place in places_of(tree, path.relative_to(tree))]
        drawn = random.Random(options.seed).sample(places, min(options.count, len(places)))
        if not run(tree, options.tests, options.timeout):
            print("the tests fail without any mutant")
            return 1
        for place in drawn:
            original = (tree / place.path).read_bytes()
            text, words = mutate(tree, place)
            (tree / place.path).write_text(text, encoding="utf-8")
            survived = run(tree, options.tests, options.timeout)
            (tree / place.path).write_bytes(original)
            killed += not survived
            print("survived" if survived else "killed  ", place.kind.ljust(9), words, flush=True)
    print(f"{killed} of {len(drawn)} killed, {killed / max(len(drawn), 1):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
