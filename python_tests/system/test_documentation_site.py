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
needs_generator = pytest.mark.skipif(
    find_spec("zensical") is None or find_spec("mkdocstrings_handlers") is None,
    reason="needs zensical and mkdocstrings-python: pip install -e '.[docs]'",
)


def build(checkout, site):
    environment = {**os.environ, "ZSSEG_PYTHON": sys.executable}
    call = ["bash", str(checkout / "tools" / "docs.sh"), str(site)]
    return subprocess.run(
        call, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "docs"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@needs_generator
def test_every_document_is_a_page(site):
    pages = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    assert {"index", "contributing", "security", "changelog", "examples", "first_hour"} <= pages


@needs_generator
def test_public_names_lead_to_their_docstrings(site):
    index = (site / "api.html").read_text(encoding="utf-8")
    assert 'href="reference/zsseg_rt.html#zsseg_rt.Engine"' in index
    details = (site / "reference" / "zsseg_rt.html").read_text(encoding="utf-8")
    assert 'id="zsseg_rt.Engine.segment"' in details
    kernels = (site / "reference" / "zsseg_rt.ops.html").read_text(encoding="utf-8")
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


PAGE = Path(__file__).parents[2] / "docs" / "api.md"
PACKAGES = (
    "zsseg_rt",
    "zsseg_rt.evaluation",
    "zsseg_rt.export",
    "zsseg_rt.fetch",
    "zsseg_rt.integrations.ray",
    "zsseg_rt.integrations.triton",
    "zsseg_rt.models",
    "zsseg_rt.ops",
    "zsseg_rt.server",
)


def documented():
    """Names and their lines by package."""
    _, *sections = re.split(r"^## `(.+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = r"^\| `(\w+)` \| (.+) \|$"
    pairs = zip(sections[::2], sections[1::2], strict=True)
    return {package: re.findall(rows, text, re.MULTILINE) for package, text in pairs}


def test_the_page_has_every_package():
    assert set(documented()) == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_explained_once(package):
    if package == "zsseg_rt.models":
        pytest.importorskip("torch")
    names = [name for name, _ in documented()[package]]
    assert sorted(names) == sorted(import_module(package).__all__)
