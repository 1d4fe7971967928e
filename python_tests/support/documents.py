"""The documents' blocks of code, the commands in them, their links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (not run|given): (.+?) -->\n *\Z")
_NUMBERS = {"N", "M", "S", "T"}


@dataclass(frozen=True)
class Block:
    """A block of code at a line of a page; ``given`` are names that its page takes for granted."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None
    given: tuple[str, ...]


def pages() -> list[Path]:
    """Everything that tells what is so now, in no order that matters: not the list of changes."""
    beside = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
    beside += ("benchmarks/kernels.md", "cpp_tests/cuda_emulation/README.md")
    return [*(ROOT / name for name in beside), *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """A page's blocks of code, in order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for fence in _FENCE.finditer(text):
        indent, language, code = fence.groups()
        mark = _MARK.search(text, 0, fence.start())
        kind, words = mark.groups() if mark else ("", "")
        blocks.append(
            Block(
                page=page.relative_to(ROOT).as_posix(),
                line=text.count("\n", 0, fence.start()) + 2,
                language=language,
                code=re.sub(f"^{indent}", "", code, flags=re.MULTILINE),
                not_run=words if kind == "not run" else None,
                given=tuple(words.split(", ")) if kind == "given" else (),
            )
        )
    return blocks


def programs_of(page: Path) -> list[Block]:
    """A page's blocks of Python that are run, in order."""
    return [b for b in blocks_of(page) if b.language == "python" and b.not_run is None]


def commands_of(page: Path, program: str) -> list[tuple[str, list[str]]]:
    """Calls of a program in a page: in shell, in units of systemd, and inline.

    Square brackets stand around what may be left out, which is kept; N, M, S and T for numbers.
    "..." leaves words out: such a call is not among them.
    """
    return [(where, words) for where, line in lines_with(page, program)
            for words in _calls(line, program) if "..." not in words]  # fmt: skip


def unread_lines_of(page: Path, program: str) -> list[str]:
    """Lines with a program's name that `commands_of` takes nothing from, each with its place."""
    return [f"{where}: {line}" for where, line in lines_with(page, program)
            if not any("..." not in words for words in _calls(line, program))]  # fmt: skip


def lines_with(page: Path, program: str) -> list[tuple[str, str]]:
    """Lines of code, and code within text, that call a program, each with its place."""
    where = page.relative_to(ROOT).as_posix()
    named = re.compile(rf"(?<![\w.-]){re.escape(program)} +\S")
    places = []
    for block in blocks_of(page):
        lines = block.code.replace("\\\n", " ").splitlines()
        if block.language == "ini":
            lines = [line.removeprefix("ExecStart=") for line in lines]
        places += [(f"{where}:{block.line}", line) for line in lines if named.search(line)]
    for inline in re.findall(r"`([^`]+)`", without_code(page)):
        if named.search(line := " ".join(inline.split())):
            places.append((where, line))
    return places


def _calls(line: str, program: str) -> Iterator[list[str]]:
    """The words of each call in a line of shell."""
    if program not in line:
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for ends, words in groupby(lexer, lambda word: set(word) <= set("&|;<>()")):
        call = [word.strip("[]").rpartition("/bin/")[2] for word in words]
        if not ends and program in call:
            call = call[call.index(program) + 1 :]
            yield ["1" if word in _NUMBERS else word for word in call]


def without_code(page: Path) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links_of(page: Path) -> list[str]:
    """A page's links, those to other sites left out."""
    text = without_code(page)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def anchors_of(page: Path) -> set[str]:
    """Names of a page's headings, as links write them."""
    text = without_code(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
