"""Builds the documentation: ``python -m tools.docs [FOLDER]``; ``tools/docs.sh`` says more."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.docs.pages import ROOT, write_pages
from tools.docs.site_check import problems

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CONFIG = ROOT / "docs" / "zensical.toml"
_NEEDED = ("zensical", "mkdocstrings_handlers.python")


def main() -> int:
    """0 if the site is built and whole, 1 if not, 4 if the generator is not installed."""
    parser = argparse.ArgumentParser(prog="tools/docs.sh")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "docs")
    site = parser.parse_args().folder.resolve()
    if any(not _is_installed(name) for name in _NEEDED):
        print("docs: zensical is not installed. Run pip install -e '.[docs]'.", file=sys.stderr)
        return 4
    work = site.with_name(f"{site.name}-pages")
    try:
        pages = write_pages(work / "pages")
    except ValueError as error:
        print(f"docs: {error}", file=sys.stderr)
        return 1
    faults = _unlisted(pages) or _build(work) or problems(work / "site")
    if not faults:
        shutil.rmtree(site, ignore_errors=True)
        (work / "site").rename(site)
    for line in faults:
        print(f"docs: {line}", file=sys.stderr)
    print(f"{len(pages)} pages in {site}" if not faults else f"{len(faults)} problems")
    return 1 if faults else 0


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _unlisted(pages: set[str]) -> list[str]:
    """Pages that the navigation lacks, or has without their being there."""
    config = tomllib.loads(_CONFIG.read_text(encoding="utf-8"))
    listed = _leaves(config["project"]["nav"])
    where = _CONFIG.relative_to(ROOT)
    missing = [f"{where}: the navigation lacks {page}" for page in sorted(pages - set(listed))]
    absent = sorted({page for page in listed if page not in pages})
    twice = sorted({page for page in listed if listed.count(page) > 1})
    missing += [f"{where}: the navigation has {page}, which is no page" for page in absent]
    return missing + [f"{where}: the navigation has {page} more than once" for page in twice]


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [leaf for entry in (nav.values() if isinstance(nav, dict) else nav)
            for leaf in _leaves(entry)]  # fmt: skip


def _build(work: Path) -> list[str]:
    """Runs the generator; what it says is wrong."""
    config = _CONFIG.read_text(encoding="utf-8").replace("@root@", ROOT.as_posix())
    (work / "zensical.toml").write_text(config, encoding="utf-8")
    call = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    call += ["--config-file", str(work / "zensical.toml")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)  # without colours
    # mkdocstrings reports what it cannot find and leaves it out; the build goes on, strict or not.
    if done.returncode != 0 or "ERROR" in said or "WARNING" in said:
        return [f"zensical ended with {done.returncode}", *said.splitlines()]
    return []


if __name__ == "__main__":
    sys.exit(main())
