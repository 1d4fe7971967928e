"""How to install optional packages; the only place that says it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from zsseg_rt.common.process import held_interrupts
from zsseg_rt.errors import BackendUnavailableError


def install_command(*extras: str) -> str:
    """The command that installs optional packages, from a checkout of this package's source."""
    commands = " or ".join(f"pip install '.[{extra}]'" for extra in extras)
    return f"{commands} in a checkout of zsseg_rt"


_DEBIAN = {
    "libGL.so": "libgl1",
    "libgthread|libglib": "libglib2.0-0",
    "GLIBCXX|CXXABI|libstdc": "libstdc++6 (in conda: conda install -c conda-forge libstdcxx-ng)",
    "libgomp": "libgomp1",
}  # what an import that failed names, and Ubuntu's package of it
_DISTRIBUTIONS = {"cv2": "opencv-python-headless", "gi": "PyGObject", "PIL": "pillow"}
_first: dict[str, str] = {}  # reasons; a second import of OpenCV speaks of a recursion alone


def why_not(exc: ImportError, package: str, command: str) -> tuple[str, str]:
    """Why an import failed, and the remedy; ``command`` is for a package that is absent."""
    if isinstance(exc, ModuleNotFoundError) and package == (exc.name or "").partition(".")[0]:
        return "nothing", f"Run: {command}"
    reason = _first.setdefault(package, " ".join(str(exc).split()))
    library = re.search(r"\blib[^\s/:]*\.so[.\d]*", reason)
    for names, debian in _DEBIAN.items():
        if re.search(names, reason):
            remedy = f"sudo apt install {debian}"
            break
    else:
        remedy = f"pip install --force-reinstall {_DISTRIBUTIONS.get(package, package)}"
        if library and "GLIBC_" not in reason:
            remedy = f"apt-file search {library[0]}, and install the package that it names"
    return f"one that cannot be imported: {reason}", f"Run: {remedy}"


def package_of(exc: ImportError) -> str:
    """The package that lacks something, or is lacking."""
    trace = exc.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    name = exc.name or (trace.tb_frame.f_globals["__name__"] if trace else "")
    return str(name).partition(".")[0]


def unavailable(
    exc: ImportError, package: str, expected: str, command: str
) -> BackendUnavailableError:
    """The error of a package that cannot be imported."""
    reason, remedy = why_not(exc, package, command)
    return BackendUnavailableError(f"{expected}, got {reason}. {remedy}")


def import_opencv(purpose: str, *, argument: str = "cv2", needs: str = "imread") -> Any:
    """The module ``cv2``; an interrupt waits for it, which NumPy would turn into an ImportError."""
    command = f"{install_command('opencv')} (on a Jetson: apt install python3-opencv)"
    expected = f"{argument}: expected OpenCV {purpose}"
    try:
        with held_interrupts():
            cv2: Any = import_module("cv2")
    except ImportError as exc:
        raise unavailable(exc, "cv2", expected, command) from exc
    if not hasattr(cv2, needs):
        raise BackendUnavailableError(f"{expected}, got one without {needs}. Run: {command}")
    return cv2


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Name the extra that installs a missing package; our own modules are never missing."""
    try:
        yield
    except ImportError as exc:
        package = package_of(exc)
        if package == "zsseg_rt":
            raise
        expected = f"{exc.name or package}: expected to be installed {purpose}"
        raise unavailable(exc, package, expected, install_command(extra)) from exc


_log = logging.getLogger(__name__)
_CORE = "zsseg_rt._C"
_INTERFACE = "_C.pyi"


class CoreFinder:
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
    """The remedy for a missing core: in a checkout, build it there or start elsewhere."""
    root = package.parent
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        return (
            f"Run: pip install -e {root} (needs a C++17 compiler), or run: pip install {root} and "
            "start Python in another folder."
        )
    return "Install the package again: pip install . (needs a C++17 compiler)"


def _installed_cores(package: Path) -> Iterator[tuple[Path, str]]:
    """Compiled cores of other installations on ``sys.path``, with their versions."""
    from importlib.metadata import distributions

    for installed in distributions(name="zsseg_rt"):
        for suffix in EXTENSION_SUFFIXES:
            core = Path(str(installed.locate_file(f"zsseg_rt/_C{suffix}")))
            if core.is_file() and core.parent.resolve() != package.resolve():
                yield core, installed.version
                break
