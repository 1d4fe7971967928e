"""Use the installed compiled core where Python starts in a folder that has only the source.

A script that starts in a checkout imports the checkout's ``zsseg_rt``, which hides the installed
one: Python looks in the script's folder first. There ``pip install .`` leaves no ``_C``.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from zsseg_rt.errors import BackendUnavailableError

_log = logging.getLogger(__name__)
_CORE = "zsseg_rt._C"
_INTERFACE = "_C.pyi"


class CoreFinder(MetaPathFinder):
    """Finds ``zsseg_rt._C`` in an installed ``zsseg_rt``; asked only where the package has none."""

    def __init__(self, package: Path, version: str) -> None:
        self._package, self._version = package, version

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the installed core of the same version and the same interface."""
        if name != _CORE:
            return None
        others = []
        for core, version in _installed_cores(self._package):
            if version == self._version and self._same_interface(core.parent):
                _log.warning(
                    "%s has no compiled core; using the installed one, %s", self._package, core
                )
                return spec_from_file_location(name, core)
            others.append(f"{core} of version {version}")
        raise BackendUnavailableError(
            f"zsseg_rt: expected the compiled core _C in {self._package}, got "
            f"{'only another one, ' + ', '.join(others) if others else 'nothing'}. "
            f"{remedy(self._package)}"
        )

    def _same_interface(self, installed: Path) -> bool:
        """Whether an installed core offers what this package's Python code calls."""
        try:
            ours, theirs = ((f / _INTERFACE).read_bytes() for f in (self._package, installed))
        except OSError:
            return False
        return ours == theirs


def remedy(package: Path) -> str:
    """What to do about a missing core: in a checkout, build it there or start elsewhere."""
    root = package.parent
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        return (
            f"Run: pip install -e {root} (needs a C++17 compiler), or run: pip install {root} and "
            "start Python in another folder."
        )
    return "Install the package again: pip install . (needs a C++17 compiler)"


def _installed_cores(package: Path) -> Iterator[tuple[Path, str]]:
    """Compiled cores of other installations on ``sys.path``, with their versions."""
    for entry in dict.fromkeys(sys.path):
        folder = Path(entry or ".").resolve() / "zsseg_rt"
        if folder == package.resolve():
            continue
        for suffix in EXTENSION_SUFFIXES:
            core = folder / f"_C{suffix}"
            if core.is_file():
                yield core, _version_in(folder.parent)
                break


def _version_in(site: Path) -> str:
    found = importlib.metadata.distributions(name="zsseg_rt", path=[str(site)])
    return next((one.version for one in found), "unknown")
