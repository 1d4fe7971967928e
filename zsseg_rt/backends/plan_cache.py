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
from dataclasses import asdict, dataclass, replace
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


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """Everything a plan depends on; two equal keys mean interchangeable plans."""

    graph_name: str  # Stem of the graph's file; only for a readable file name
    graph_sha256: str  # Hash of the graph's bytes
    runtime: str  # Flavour and full version of what builds the plan, such as "tensorrt-10.3.0"
    # GPU the plan is for: compute capability; where a plan is tied to the very GPU, also its name,
    # multiprocessors and memory, the driver and the CUDA runtime
    target: str
    precision: str  # The precision that was asked for
    shapes: Mapping[str, tuple[int, int, int]]  # {axis name: (min, opt, max)} of the dynamic axes

    def fields(self) -> dict[str, Any]:
        """The key in JSON's types, with this file's format version."""
        shapes = {name: list(bounds) for name, bounds in sorted(self.shapes.items())}
        return {**asdict(self), "shapes": shapes, "format_version": FORMAT_VERSION}

    @property
    def file_stem(self) -> str:
        """Readable name that ends in the hash of all fields."""
        digest = hashlib.sha256(json.dumps(self.fields(), sort_keys=True).encode()).hexdigest()
        words = (self.graph_name, self.runtime, self.target, self.precision, digest[:32])
        name = "-".join(words).lower()
        return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in name)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A compiled graph."""

    data: bytes  # The runtime's own bytes
    report: Mapping[str, Any]  # What was built, in JSON's types
    path: Path | None = None  # Where it is on disk; None if it is not cached
    sha256: str = ""  # Checksum of its cache entry; empty if it is not cached
    # Stored verdict of the golden sample; see keep_golden
    golden: Mapping[str, Any] | None = None


class PlanCache:
    """Plans under ``folder/engines``; several processes may share it."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else Path(folder) / "engines"

    def path(self, key: PlanKey) -> Path | None:
        """Where the plan of a key is or would be stored."""
        return None if self._folder is None else self._folder / f"{key.file_stem}.plan"

    def get_or_build(self, key: PlanKey, build: Callable[[], Plan]) -> Plan:
        """Return the stored plan, or build and store it.

        Only one process builds a key; the others wait for it. A cache that cannot be read or
        written is reported as a warning and the freshly built plan is returned uncached.
        """
        path = self.path(key)
        if path is None:
            return build()
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(path.with_suffix(".plan.lock")))
                remove_abandoned(path.parent)
            except OSError as exc:  # what is stored there may still be read
                _log.warning("plan cache: cannot write %s: %s. %s", path, exc, _UNCACHED)
            return _read(path, key) or _store(path, key, build())

    def discard(self, key: PlanKey, reason: str) -> None:
        """Remove a plan that its runtime refused, so that it is built again."""
        path = self.path(key)
        if path is not None:
            _plans(path, key).discard(path.name, f"was refused: {reason}")
            _remove_further(path)


def _plans(path: Path, key: PlanKey) -> Cache:
    return Cache(path.parent, key.fields())


def _read(path: Path, key: PlanKey) -> Plan | None:
    entry = _plans(path, key).read(path.name, max_bytes=MAX_PLAN_BYTES)
    if entry is None:
        return None
    _log.info("plan cache: using %s", path)
    verdict = Cache(path.parent, entry.sha256).read(_golden(path), max_bytes=_MAX_VERDICT_BYTES)
    return Plan(
        data=entry.data,
        report=entry.about,
        path=path,
        sha256=entry.sha256,
        golden=None if verdict is None else verdict.about,
    )


def _store(path: Path, key: PlanKey, plan: Plan) -> Plan:
    _remove_further(path)
    digest = _plans(path, key).keep(path.name, plan.data, dict(plan.report), else_=_UNCACHED)
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
