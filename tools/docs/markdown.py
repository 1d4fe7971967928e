"""Turn Markdown as code hosts read it into Markdown as the site's generator reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

__all__ = ["for_site", "slug"]

_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"^ *<!--.*?--> *\n", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ITEM = re.compile(r" *(?:[-*]|\d+\.) +")


def for_site(text: str, target: Callable[[str], str]) -> str:
    """Rewrite a page.

    Links lead to where the site has their targets, comments go, lists and tables stand apart from
    the text before them, and what belongs to a list item is indented by four columns a level: the
    generator takes less for the end of the item.

    Args:
        text: The page as it is in the checkout.
        target: Says where a link of the page leads on the site.

    Raises:
        ValueError: It has code that is only indented, which would pass for text.
    """
    pieces = []
    end = 0
    for fence in _FENCE.finditer(text):
        pieces += [_prose(text[end : fence.start()], target), fence.group()]
        end = fence.end()
    pieces.append(_prose(text[end:], target))
    return "\n".join(_spaced("".join(pieces).splitlines())) + "\n"


def slug(heading: str) -> str:
    """The name of a heading, as code hosts make it."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def _prose(text: str, target: Callable[[str], str]) -> str:
    text = _COMMENT.sub("", text)
    return _LINK.sub(lambda link: f"]({target(link.group(1))})", text)


def _spaced(lines: list[str]) -> Iterator[str]:
    """The lines with the blank ones and the indentation that the generator needs."""
    columns: list[int] = []  # where the contents of the list items begin that a line belongs to
    before, fenced = "", False
    for line in lines:
        text = line.strip()
        if fenced:
            fenced = text != "```"
            yield _indented(line[columns[-1] if columns else 0 :], columns)
            continue
        item = _ITEM.match(line)
        fenced = text.startswith("```")
        starts = item or fenced or text.startswith(("#", "|"))
        indent = len(line) - len(line.lstrip())
        if text and (starts or not before):
            while columns and indent < columns[-1]:
                columns.pop()
        if text and not before and indent >= 4 + (columns[-1] if columns else 0):
            raise ValueError(f"expected code between lines of ```, got it indented: {text}")
        if _stands_apart(text, before, item is not None and not columns):
            yield ""
        yield _indented(text, columns)
        if item:
            columns.append(item.end())
        before = text


def _stands_apart(text: str, before: str, first_level: bool) -> bool:
    """Whether a blank line has to come between two lines."""
    if not before or not text:
        return False
    if text.startswith("|"):
        return not before.startswith("|")
    return text.startswith("```") or (first_level and not _ITEM.match(before))


def _indented(text: str, columns: list[int]) -> str:
    return " " * 4 * len(columns) + text if text else ""
