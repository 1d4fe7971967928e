"""Shows names that docstrings mark for Sphinx as code: the generator knows no such marks.

Docstrings that code completes (``zsseg_rt.common.settings``) are read from the class itself.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Takes the marks off when a docstring is read."""

    def on_instance(self, *, obj: griffe.Object, **unused: Any) -> None:
        """Called by griffe for each object that it finds."""
        if any(str(one.value) == "documented" for one in getattr(obj, "decorators", ())):
            cls = getattr(importlib.import_module(obj.module.path), obj.name)
            obj.docstring = griffe.Docstring(inspect.getdoc(cls) or "", parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
