"""Checks a built site: every link leads somewhere, nothing is fetched from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["problems"]

# Attributes whose address a browser fetches by itself.
_FETCHED = {"src", "srcset", "poster", "data", "action"}
_CSS_URL = re.compile(r"@import\s+[\"']([^\"']+)|url\(\s*[\"']?([^\"')]+)")
_EMBEDDED = ("data:", "#")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value for key, value in attrs if value}
        self.names.update(attributes[key] for key in ("id", "name") if key in attributes)
        self.fetched += [attributes[key] for key in sorted(_FETCHED & attributes.keys())]
        if "href" in attributes:
            (self.links if tag == "a" else self.fetched).append(attributes["href"])


@cache
def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def problems(site: Path) -> list[str]:
    """List the faults of a site.

    Args:
        site: The folder that was built.

    Returns:
        One line for each link without a target, missing anchor, and address that a browser would
        fetch from elsewhere.
    """
    faults = []
    for path in sorted(site.rglob("*.html")):
        page, where = _read(path), path.relative_to(site).as_posix()
        faults += [f"{where}: fetches {url}" for url in page.fetched if _is_elsewhere(url)]
        here = [url for url in page.links + page.fetched if not _is_elsewhere(url)]
        faults += [f"{where}: {told}" for url in here if (told := _broken(url, path, site))]
    for path in sorted(site.rglob("*.css")):
        for match in _CSS_URL.finditer(path.read_text(encoding="utf-8")):
            url = match.group(1) or match.group(2)
            if _is_elsewhere(url) and not url.startswith(_EMBEDDED):
                faults.append(f"{path.relative_to(site).as_posix()}: fetches {url}")
    return faults


def _is_elsewhere(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.scheme or parts.netloc) and not url.startswith(_EMBEDDED)


def _broken(url: str, page: Path, site: Path) -> str | None:
    """The fault of an address within the site, or None."""
    if url.startswith("data:"):
        return None
    parts = urlsplit(url)
    path = unquote(parts.path)
    target = (site / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve()
    target = page.resolve() if not path else target
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site.resolve()) or not target.is_file():
        return f"no such file: {url}"
    anchor = unquote(parts.fragment)
    if anchor and target.suffix == ".html" and anchor not in _read(target).names:
        return f"no such anchor: {url}"
    return None
