"""Every example of docs/examples runs as it is, on what ships with the package, without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["onnx"] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""
SAYS = {
    "evaluation": ["mIoU(S): ", "hardest: "],
    "first_labels": ["red tiled floor: ", "mask.png: 256 rows of 256 labels"],
    "own_embeddings": ["sand: ", "sky: ", "mean score 0."],
    "swapping_classes": ["3 [", "4 [", "5 [", "6 [", "'star'", "'yellow sand'"],
    "two_lanes": ["'red tiled floor'", "'yellow sand'"],
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name, tmp_path):
    call = [sys.executable, "-c", WITHOUT_TORCH, str(EXAMPLES / f"{name}.py")]
    place = os.environ | {"ZSSEG_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        call, cwd=tmp_path, env=place, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [words for words in SAYS[name] if words not in done.stdout] == []
