"""The example that docs/training.md begins with works as it stands, trained for three steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from support import documents

PAGE = documents.ROOT / "docs" / "training.md"
SHORT = "zsseg-rt train --config dogs.toml --set loop.iterations=3 --set loop.batch_size=2"


def blocks():
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(r"^## An example.*?(?=^## )", text, re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def test_the_example_runs_from_photos_to_labels(tmp_path):
    for folder in ("zsseg_rt", "tools"):
        (tmp_path / folder).symlink_to(documents.ROOT / folder)
    (settings,) = (code for language, code in blocks() if language == "toml")
    (tmp_path / "dogs.toml").write_text(settings)
    commands = "".join(code for language, code in blocks() if language == "bash")
    assert commands.count("--config dogs.toml\n") == 1
    commands = commands.replace("zsseg-rt train --config dogs.toml\n", f"{SHORT}\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    place = {"PATH": path, "PYTHONPATH": str(documents.ROOT), "ZSSEG_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=os.environ | place,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "polygons").glob("*.json"))) == 36
    assert len((tmp_path / "dogs" / "val.txt").read_text().split()) == 9
    figures = json.loads((tmp_path / "runs" / "dogs" / "evaluations.json").read_text())
    assert figures
    assert len(list((tmp_path / "labelled").glob("*.mask.png"))) == 36
