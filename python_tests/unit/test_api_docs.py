"""docs/api.md names what the packages offer, all of it and nothing else."""

import re
from importlib import import_module
from pathlib import Path

import pytest

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
