"""The site's pages: the checkout's documents, the examples, and public names by package."""

from __future__ import annotations

import ast
import json
import posixpath
import re
import shutil
from pathlib import Path

from tools.docs.markdown import for_site, slug

__all__ = ["ROOT", "write_pages"]

ROOT = Path(__file__).resolve().parents[2]

# Documents beside docs/, by their page.
_BESIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/kernels.md": "kernel_benchmark.md",
    "cpp_tests/cuda_emulation/README.md": "emulated_gpu.md",
}
_EXAMPLES = "docs/examples"
_NOTEBOOK = "docs/examples/first_hour.ipynb"


def write_pages(folder: Path) -> set[str]:
    """Write every page, as the generator reads it.

    Args:
        folder: Where to; made anew.

    Returns:
        The pages' paths in it.

    Raises:
        ValueError: A page links to something that the site does not have, or has indented code.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    homes = {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")} | _BESIDE
    pages = {}
    for source, page in homes.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        try:
            pages[page] = for_site(text, lambda link, at=source: _target(link, at, homes))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    pages["api.md"], references = _references(pages["api.md"])
    pages |= references | {"examples.md": _examples(), "first_hour.md": _notebook()}
    for page, text in pages.items():
        (folder / page).parent.mkdir(exist_ok=True)
        (folder / page).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", folder / "images")
    for extra in (ROOT / "docs").glob("*.css"):
        shutil.copy(extra, folder)
    return set(pages)


def _target(link: str, source: str, homes: dict[str, str]) -> str:
    """Where the site has what a link in a document leads to; its documents lie in one folder."""
    if "://" in link or link.startswith(("#", "mailto:")):
        return link
    path, hash_mark, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if path in homes:
        return homes[path] + hash_mark + anchor
    if path == _EXAMPLES:
        return "examples.md"
    if path == _NOTEBOOK:
        return "first_hour.md"
    if path.startswith(f"{_EXAMPLES}/") and path.endswith(".py"):
        return f"examples.md#{slug(posixpath.basename(path))}"
    if path.startswith("docs/images/"):
        return path.removeprefix("docs/")
    raise ValueError(
        f"expected links to documents, pictures and examples, got {link}. "
        "Add where the site has it, to tools/docs/pages.py."
    )


def _references(index: str) -> tuple[str, dict[str, str]]:
    """The page of public names with a link for each name, and a page of details a package."""
    head, *sections = re.split(r"^## `(.+)`$", index, flags=re.MULTILINE)
    pages = {}
    linked = [head]
    for package, text in zip(sections[::2], sections[1::2], strict=True):
        page = f"reference/{package}.md"
        names = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
        about = text.partition("\n| name |")[0].replace("](", "](../")
        parts = [f"# `{package}`\n{about}\n", *(f"::: {package}.{name}\n" for name in names)]
        pages[page] = "\n".join(parts)
        rows = rf"| [`\1`]({page}#{package}.\1) |"
        linked.append(f"## `{package}`\n" + re.sub(r"(?m)^\| `(\w+)` \|", rows, text))
    return "".join(linked), pages


def _examples() -> str:
    """Every example with its program."""
    parts = ["# Examples\n\nPrograms that run unchanged, from the folder `docs/examples`.\n"]
    for path in sorted((ROOT / _EXAMPLES).glob("*.py")):
        code = path.read_text(encoding="utf-8")
        about = (ast.get_docstring(ast.parse(code)) or "").partition("\n\n")[0]
        parts.append(f"## {path.name}\n\n{about}\n\n```python\n{code.rstrip()}\n```\n")
    return "\n".join(parts)


def _notebook() -> str:
    """The notebook's texts and programs, without what it printed."""
    notebook = json.loads((ROOT / _NOTEBOOK).read_text(encoding="utf-8"))
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"]).rstrip()
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return for_site("\n\n".join(parts) + "\n", lambda link: link)
