"""Writes what settings mean into docs/settings.md: ``python -m tools.docs.settings``.

The lists between its marks are made from the fields of the classes; everything else is by hand.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from zsseg_rt.config import EngineConfig
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.server.settings import ServerSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
CLASSES = (EngineConfig, ServerSettings, ExportOptions)
_MARK = "<!-- made by python -m tools.docs.settings: {} -->"
_ROLE = re.compile(r":\w+:`~?([^`]+)`|``([^`]+)``")


def with_lists(page: str) -> str:
    """The page with its lists made anew.

    Raises:
        ValueError: A mark is missing.
    """
    for cls in CLASSES:
        begin, end = _MARK.format(cls.__name__), _MARK.format("end")
        head, opened, tail = page.partition(begin)
        _, closed, rest = tail.partition(end)
        if not (opened and closed):
            raise ValueError(f"{PAGE.name}: expected the marks {begin} and {end}. Put them back.")
        entries = "\n".join(map(_entry, dataclasses.fields(cls)))
        page = f"{head}{begin}\n\n{entries}\n\n{end}{rest}"
    return page


def _entry(field: dataclasses.Field[Any]) -> str:
    option = field.metadata["option"]
    default = repr(field.default).replace("'", '"')
    notes = [] if field.default is dataclasses.MISSING else [f"`{default}`"]
    notes += [] if option is None else [f"`{option.name(field.name)}`"]
    words = _ROLE.sub(lambda role: f"`{role[1] or role[2]}`", field.metadata["doc"])
    noted = f" ({', '.join(notes)})" if notes else ""
    about = f"- **`{field.name}`**{noted}: {words}"
    wrap = textwrap.TextWrapper(139, subsequent_indent="  ", break_on_hyphens=False)
    wrap.break_long_words = False
    return wrap.fill(about)


if __name__ == "__main__":
    PAGE.write_text(with_lists(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
