"""What a target is, and the list of them."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsseg_rt.errors import ZssegError

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "python_tests/bundles/v1"

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


def case_of(seed: int, name: str, number: int) -> random.Random:
    """The random numbers of one case: the same in every process."""
    return random.Random(f"{seed} {name} {number}")
