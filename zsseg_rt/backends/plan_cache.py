"""Keep compiled plans on disk: content-addressed, checked on reading, written whole or not at all.

A plan is derived data. The first line of its file says in plain text what it was built from and
what was built; a plan that does not match is rebuilt and the reason is logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zsseg_rt.common.files import Cache, locked, remove_abandoned, remove_entry

FORMAT_VERSION = 3  # 3: record and plan in one file
MAX_PLAN_BYTES = 16 << 30
_MAX_VERDICT_BYTES = 1 << 20

_log = logging.getLogger(__name__)
_UNCACHED = (
    "The plan is used from memory and built again next time. Free space there, allow writing, or "
    "choose another cache folder."
)


@dataclass(frozen=True)
class Plan:
    """A compiled graph."""

    data: bytes  # The runtime's own bytes
    report: Mapping[str, Any]  # What was built, in JSON's types
    path: Path | None = None  # Where it is on disk; None if it is not cached
    sha256: str = ""  # Checksum of its cache entry; empty if it is not cached
    # Stored verdict of the golden sample; see keep_golden
    golden: Mapping[str, Any] | None = None


class PlanCache:
    """The plan of a key under ``folder/engines``; several processes may share it.

    Plans of equal keys are interchangeable. A key has ``graph_name``; ``graph_sha256``;
    ``runtime``, flavour and full version of what builds it; ``target``, the compute capability, and
    where a plan is tied to the very GPU its name, multiprocessors and memory, the driver and the
    CUDA runtime; ``precision``, as asked for; and ``shapes``, ``{axis: (min, opt, max)}``.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self._key = {**key, "format_version": FORMAT_VERSION}
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        words = [key[name] for name in ("graph_name", "runtime", "target", "precision")]
        name = "-".join([*words, digest[:32]]).lower()
        name = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in name)
        self.path = None if folder is None else Path(folder) / "engines" / f"{name}.plan"

    def get_or_build(self, build: Callable[[], Plan]) -> Plan:
        """Return the stored plan, or build and store it.

        Only one process builds a key; the others wait for it. A cache that cannot be read or
        written is reported as a warning and the freshly built plan is returned uncached.
        """
        path = self.path
        if path is None:
            return build()
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(path.with_suffix(".plan.lock")))
                remove_abandoned(path.parent)
            except OSError as exc:  # what is stored there may still be read
                _log.warning("plan cache: cannot write %s: %s. %s", path, exc, _UNCACHED)
            return self._read(path) or self._store(path, build())

    def discard(self, reason: str) -> None:
        """Remove a plan that its runtime refused, so that it is built again."""
        if self.path is not None:
            Cache(self.path.parent, self._key).discard(self.path.name, f"was refused: {reason}")
            _remove_further(self.path)

    def _read(self, path: Path) -> Plan | None:
        entry = Cache(path.parent, self._key).read(path.name, max_bytes=MAX_PLAN_BYTES)
        if entry is None:
            return None
        _log.info("plan cache: using %s", path)
        verdicts = Cache(path.parent, entry.sha256)
        verdict = verdicts.read(_golden(path), max_bytes=_MAX_VERDICT_BYTES)
        golden = None if verdict is None else verdict.about
        return Plan(entry.data, entry.about, path, entry.sha256, golden)

    def _store(self, path: Path, plan: Plan) -> Plan:
        _remove_further(path)
        cache, report = Cache(path.parent, self._key), dict(plan.report)
        digest = cache.keep(path.name, plan.data, report, else_=_UNCACHED)
        return replace(plan, path=path, sha256=digest) if digest else plan


def keep_golden(plan: Plan, verdict: Mapping[str, Any]) -> None:
    """Note beside a cached plan what the golden sample showed of it.

    Where that fails there is a warning: the sample runs again at the next start.
    """
    if plan.path is not None:
        verdicts = Cache(plan.path.parent, plan.sha256)
        remedy = "The plan is checked again at the next start."
        verdicts.keep(_golden(plan.path), b"", dict(verdict), else_=remedy)


def kernels_path(plan_path: Path) -> Path:
    """Where the kernels that TensorRT-RTX compiles for a plan are kept."""
    return plan_path.with_suffix(".kernels")


def _golden(plan_path: Path) -> str:
    return plan_path.with_suffix(".golden").name


def _remove_further(path: Path) -> None:
    """Remove what belongs to an earlier plan: kernels and the golden sample's verdict."""
    for file in (kernels_path(path), path.with_name(_golden(path))):
        with suppress(OSError):  # it does not match another plan either
            remove_entry(file)
