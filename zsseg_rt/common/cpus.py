"""How many CPUs this process may use: its affinity, and the quota of its container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus() -> int:
    """The CPUs that the process may run on, or its quota of CPU time, rounded up, if that is less.

    At least 1.
    """
    return threads_in_quota() or len(os.sched_getaffinity(0))


def threads_in_quota() -> int:
    """The quota of CPU time in whole CPUs, rounded up; 0 if it leaves all that may be run on."""
    quota = cpu_quota()
    return math.ceil(quota) if quota <= len(os.sched_getaffinity(0)) - 1 else 0


def cpu_quota(root: Path = Path("/")) -> float:
    """CPU seconds per second that the process's control groups allow; infinite without a limit.

    Every group above the process's own limits it too. In a container without a namespace for groups
    the process's own path is the host's and absent; the container's group is then the root.
    """
    groups = root / "sys/fs/cgroup"
    limits = [math.inf]
    for controllers, path in _groups_of_process(root):
        if controllers == "":
            limits += [_limit_v2(group) for group in _with_parents(groups, path)]
        elif "cpu" in controllers.split(","):
            for mount in {groups / controllers, groups / "cpu"}:
                limits += [_limit_v1(group) for group in _with_parents(mount, path)]
    return min(limits)


def _groups_of_process(root: Path) -> Iterator[tuple[str, str]]:
    """Controllers and path of each group; version 2 names no controllers."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, group = line.partition(":")
        controllers, colon, path = group.partition(":")
        if colon:
            yield controllers, path


def _with_parents(mount: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts) + 1):
        yield mount.joinpath(*parts[:count])


def _limit_v2(group: Path) -> float:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    return _ratio(quota, period)


def _limit_v1(group: Path) -> float:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float:
    """Quota by period; infinite where there is none: ``max`` or -1."""
    try:
        allowed, of = int(quota), int(period)
    except ValueError:
        return math.inf
    return allowed / of if allowed > 0 and of > 0 else math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # as without control groups
        return ""
