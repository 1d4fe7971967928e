"""The documentation builds as a whole site that needs nothing else; api.md names what is public."""

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.docs.site_check import problems

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    find_spec("zensical") is None or find_spec("mkdocstrings_handlers") is None,
    reason="needs zensical and mkdocstrings-python: pip install -e '.[docs]'",
)
def test_every_document_is_a_page_and_public_names_lead_to_their_docstrings(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "docs.sh"), str(tmp_path / "docs")],
        env=os.environ | {"ZSSEG_PYTHON": sys.executable},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (tmp_path / "docs").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    assert {"index", "contributing", "security", "changelog", "examples", "first_hour"} <= pages
    index, details, kernels = (
        (tmp_path / "docs" / f"{name}.html").read_text(encoding="utf-8")
        for name in ("api", "reference/zsseg_rt", "reference/zsseg_rt.ops")
    )
    assert 'href="reference/zsseg_rt.html#zsseg_rt.Engine"' in index
    assert 'id="zsseg_rt.Engine.segment"' in details
    assert "Raises:" in kernels
    assert ":class:" not in kernels + details


def test_broken_links_and_foreign_addresses_are_found(tmp_path):
    pages = {
        "one": '<p id="a"></p><a href="two.html#b">x</a><a href="https://example.org">x</a>',
        "two": '<a href="#b">x</a><a href="three.html">x</a><a href="one.html#a">x</a>'
        '<img src="//example.org/x.png"><link href="https://example.org/x.css">',
    }
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    (tmp_path / "x.css").write_text("@import 'https://example.org/y.css'; a { b: url(data:x) }")
    assert problems(tmp_path) == [
        "one.html: no such anchor: two.html#b",
        "two.html: fetches //example.org/x.png",
        "two.html: fetches https://example.org/x.css",
        "two.html: no such anchor: #b",
        "two.html: no such file: three.html",
        "x.css: fetches https://example.org/y.css",
    ]


def test_every_public_name_is_explained_once():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## `(.+)`$", text, flags=re.MULTILINE)
    assert set(sections[::2]) == {
        "zsseg_rt", "zsseg_rt.evaluation", "zsseg_rt.export", "zsseg_rt.fetch",
        "zsseg_rt.integrations.ray", "zsseg_rt.integrations.triton", "zsseg_rt.models",
        "zsseg_rt.ops", "zsseg_rt.server",
    }  # fmt: skip
    for package, rows in zip(sections[::2], sections[1::2], strict=True):
        if package != "zsseg_rt.models" or find_spec("torch"):
            names = re.findall(r"^\| `(\w+)` \| .+ \|$", rows, re.MULTILINE)
            assert sorted(names) == sorted(import_module(package).__all__)
