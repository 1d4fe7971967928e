"""Targets, and the list of them."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsseg_rt.errors import ZssegError

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "python_tests/bundles/v1"

# Groups that test another build of the core, and the variables that say where it is.
BUILDS = {"emulated": "ZSSEG_EMULATED_EXTENSION", "sanitized": "ZSSEG_SANITIZED_EXTENSION"}

Attempt = Callable[[random.Random], None]
Prepare = Callable[[Path], Attempt]


class RefusedError(ZssegError):
    """An internal reader refused as its contract says, with an error that callers translate."""


@dataclass(frozen=True)
class Target:
    """One kind of hostile input.

    Attributes:
        name: As on the command line.
        about: What is altered, in one line.
        prepare: Makes what the cases start from in a folder of its own; returns what tries a case.
        group: Targets of one group share a process.
        weight: Its share of the time.
        by_default: Whether it is tried if no target is named.
    """

    name: str
    about: str
    prepare: Prepare
    group: str
    weight: float
    by_default: bool


TARGETS: dict[str, Target] = {}


def target(
    name: str,
    about: str,
    *,
    group: str = "runtime",
    weight: float = 1.0,
    by_default: bool = True,
) -> Callable[[Prepare], Prepare]:
    """Register the decorated function as a target's ``prepare``."""

    def register(prepare: Prepare) -> Prepare:
        TARGETS[name] = Target(name, about, prepare, group, weight, by_default)
        return prepare

    return register


def test_support(name: str) -> Any:
    """A module of ``python_tests/support``."""
    folder = str(ROOT / "python_tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"support.{name}")


def extension_of(group: str) -> dict[str, str]:
    """The environment in which a group's process loads another build of the core."""
    if group not in BUILDS:
        return {}
    environment = {"ZSSEG_EXTENSION": os.environ[BUILDS[group]]}
    if group == "sanitized":
        environment |= {
            "LD_PRELOAD": " ".join(_runtime(name) for name in ("libasan.so", "libubsan.so")),
            # Python itself keeps memory to its end, and its arrays may be larger than is there.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    return environment


def _runtime(library: str) -> str:
    """Where the compiler keeps a sanitizer's library."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={library}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{library}: expected one of {command[0]}'s, got none. Install it.")
    return path


def case_of(seed: int, name: str, number: int) -> random.Random:
    """The random numbers of one case: the same in every process."""
    return random.Random(f"{seed} {name} {number}")
