"""Keep compiled plans on disk: content-addressed, checked on reading, written whole or not at all.

A plan is derived data. Beside each plan is a JSON file that says in plain text what it was built
from and holds the plan's hash; a plan that does not match is rebuilt and the reason is logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zsseg_rt.backends.cache_lock import locked
from zsseg_rt.common.files import read_limited, remove_entry, write_atomically

FORMAT_VERSION = 2  # 2: float32 without TF32, targets with the GPU's size and driver
MAX_RECORD_BYTES = 64 << 20
MAX_PLAN_BYTES = 16 << 30

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """Everything a plan depends on; two equal keys mean interchangeable plans.

    Attributes:
        graph_name: Stem of the graph's file; only for a readable file name.
        graph_sha256: Hash of the graph's bytes.
        runtime: Flavour and full version of what builds the plan, such as ``"tensorrt-10.3.0"``.
        target: GPU the plan is for: compute capability; where a plan is tied to the very GPU, also
            its name, multiprocessors and memory, the driver and the CUDA runtime.
        precision: The precision that was asked for.
        shapes: ``{axis name: (min, opt, max)}`` of the dynamic axes.
    """

    graph_name: str
    graph_sha256: str
    runtime: str
    target: str
    precision: str
    shapes: Mapping[str, tuple[int, int, int]]

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
    """A compiled graph.

    Attributes:
        data: The runtime's own bytes.
        report: What was built, in JSON's types.
        path: Where it is on disk; None if it is not cached.
        sha256: Of ``data``; empty if it is not cached.
        golden: Stored verdict of the golden sample; see :func:`keep_golden`.
    """

    data: bytes
    report: Mapping[str, Any]
    path: Path | None = None
    sha256: str = ""
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
                stack.enter_context(locked(path.with_suffix(path.suffix + ".lock")))
            except OSError as exc:
                _warn_unusable(path, exc)  # what is stored there may still be read
            return self._read(path, key) or self._store(path, key, build())

    def discard(self, key: PlanKey, reason: str) -> None:
        """Remove a plan that its runtime refused, so that it is built again."""
        path = self.path(key)
        if path is None:
            return
        _log.warning("plan cache: %s is built again: %s", path, reason)
        _remove_remains(path)

    def _read(self, path: Path, key: PlanKey) -> Plan | None:
        try:
            if not os.path.lexists(path) and not os.path.lexists(_sidecar(path)):
                return None
            record = json.loads(read_limited(_sidecar(path), max_bytes=MAX_RECORD_BYTES))
            data = read_limited(path, max_bytes=MAX_PLAN_BYTES)
        except (OSError, ValueError, RecursionError) as exc:
            _log.warning("plan cache: %s is built again: cannot be read: %s", path, exc)
            return None
        reason = _mismatch(record, data, key)
        if reason:
            _log.warning("plan cache: %s is built again: %s", path, reason)
            return None
        _log.info("plan cache: using %s", path)
        golden = record.get("golden")
        return Plan(
            data=data,
            report=record["report"],
            path=path,
            sha256=record["plan"]["sha256"],
            golden=golden if isinstance(golden, dict) else None,
        )

    def _store(self, path: Path, key: PlanKey, plan: Plan) -> Plan:
        digest = hashlib.sha256(plan.data).hexdigest()
        plan_facts = {"sha256": digest, "bytes": len(plan.data)}
        record = {"key": key.fields(), "plan": plan_facts, "report": plan.report}
        try:
            _remove_stale(path)
            for file in (_sidecar(path), path):
                remove_entry(file)
            write_atomically(path, plan.data)
            text = json.dumps(record, indent=2, sort_keys=True) + "\n"
            write_atomically(_sidecar(path), text.encode())
        except OSError as exc:
            _remove_remains(path)
            _warn_unusable(path, exc)
            return plan
        return Plan(data=plan.data, report=plan.report, path=path, sha256=digest)


def keep_golden(plan: Plan, verdict: Mapping[str, Any]) -> None:
    """Write into a cached plan's record what the golden sample showed of it.

    A record that cannot be written causes a warning: the sample runs again at the next start. One
    that another process has replaced by then, with a plan of its own, is left alone.
    """
    if plan.path is None:
        return
    try:
        with locked(plan.path.with_suffix(plan.path.suffix + ".lock")):
            record = json.loads(read_limited(_sidecar(plan.path), max_bytes=MAX_RECORD_BYTES))
            if record["plan"]["sha256"] != plan.sha256:
                return
            text = json.dumps(record | {"golden": dict(verdict)}, indent=2, sort_keys=True) + "\n"
            write_atomically(_sidecar(plan.path), text.encode())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        _log.warning(
            "plan cache: cannot note in %s that its plan was checked: %s. It is checked again at "
            "the next start.",
            _sidecar(plan.path),
            exc,
        )


def kernels_path(plan_path: Path) -> Path:
    """Where the kernels that TensorRT-RTX compiles for a plan are kept."""
    return plan_path.with_suffix(".kernels")


def _sidecar(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".json")


def _mismatch(record: Any, data: bytes, key: PlanKey) -> str:
    """Why a stored plan cannot be used; empty if it can."""
    if not isinstance(record, dict) or not {"key", "plan", "report"} <= record.keys():
        return "its record is not one of this package"
    stored, wanted = record["key"], key.fields()
    if stored != wanted:
        names = wanted if not isinstance(stored, dict) else wanted.keys() | stored.keys()
        different = [
            f"{name}: expected {wanted.get(name)!r}, got {stored.get(name)!r}"
            for name in sorted(names)
            if isinstance(stored, dict) and stored.get(name) != wanted.get(name)
        ]
        return "; ".join(different) or "its record holds no key"
    facts = record["plan"] if isinstance(record["plan"], dict) else {}
    if len(data) != facts.get("bytes"):
        return f"expected {facts.get('bytes')} bytes, got {len(data)}"
    if hashlib.sha256(data).hexdigest() != facts.get("sha256"):
        return "its bytes were altered (sha256 differs)"
    return "" if isinstance(record["report"], dict) else "its record holds no report"


def _remove_stale(path: Path) -> None:
    """Remove temporary files of writers that died; the lock is held, so none is alive."""
    for stale in path.parent.glob(f".{path.name}*.tmp"):
        _remove_quietly(stale)


def _remove_remains(path: Path) -> None:
    """Remove a plan with its record and the kernels that a runtime compiled from it."""
    for file in (_sidecar(path), path, kernels_path(path)):
        _remove_quietly(file)


def _remove_quietly(path: Path) -> None:
    try:
        remove_entry(path)
    except OSError as exc:
        _log.warning("plan cache: cannot remove %s: %s. Remove it yourself.", path, exc)


def _warn_unusable(path: Path, exc: Exception) -> None:
    _log.warning(
        "plan cache: cannot write %s: %s. The plan is used from memory and built again next time. "
        "Free space there, allow writing, or choose another cache folder.",
        path,
        exc,
    )
