"""The cases that are measured: groups of cases, the rivals of each, and what rivals need."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["frame", "labels", "overlay"]
Model = Literal["real", "demo", ""]
Size = tuple[int, int]

VGA: Size = (480, 640)
SIZES: tuple[Size, ...] = ((256, 256), (512, 512), (1080, 1920), (2160, 3840))
CLASSES = (1, 20, 171, 1000)
THREADS = 2
GROUPS = ("engine", "classes", "postprocess")
INSTALL = {
    "torch": "pip install '.[torch]'",
    "onnxruntime": "pip install onnxruntime",
    "openvino": "pip install openvino",
    "cv2": "pip install opencv-python-headless",
    "supervision": "pip install supervision",
    "c++": "apt-get install g++",
}
"""Packages that a rival may need, and the commands that install them."""
_BYTES_A_VALUE = 4
_SHARE_OF_MEMORY = 0.5


@dataclass(frozen=True)
class Case:
    """One thing to do; rivals that do it take turns.

    Attributes:
        task: From a frame to labels, from logits to labels, or from labels to a picture.
        model: Whose network, where there is one.
        classes: Number of classes.
        out_hw: Height and width of the frame and of its labels.
        threads: CPU threads of every library.
    """

    task: Task
    model: Model
    classes: int
    out_hw: Size
    threads: int

    def __str__(self) -> str:
        height, width = self.out_hw
        model = f" {self.model}" if self.model else ""
        return (
            f"{self.task}{model}, classes {self.classes}, {width}x{height}, threads {self.threads}"
        )


@dataclass(frozen=True)
class Rival:
    """One way to do a task.

    Attributes:
        name: What reports call it.
        kind: See ``child.py``.
        arguments: Of its class, besides threads and files.
        needs: Keys of :data:`INSTALL`.
        full_logits: Whether it writes logits of every class at the size of the labels.
        short_runs: Whether it takes part in short runs.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    full_logits: bool = False
    short_runs: bool = True


def _torch(name: str, precision: str, *, compiled: bool = False) -> Rival:
    return Rival(
        name,
        "torch",
        {"precision": precision, "compiled": compiled},
        ("torch", "c++") if compiled else ("torch",),
        full_logits=True,
        short_runs=precision == "float32" and not compiled,
    )


def _graphs(name: str, library: str, precision: str) -> Rival:
    arguments = {"library": library, "precision": precision}
    needs, short = (library, "torch"), precision == "float32"
    return Rival(name, "graphs", arguments, needs, full_logits=True, short_runs=short)


def _after(kind: str, name: str, *needs: str, library: str = "") -> Rival:
    library = library or name
    full_logits = library in ("torch argmax", "torch max")
    short = library not in ("torch argmax", "torch.compile")
    return Rival(name, kind, {"library": library}, needs, full_logits, short)


RIVALS: dict[Task, tuple[Rival, ...]] = {
    "frame": (
        Rival("engine float32", "engine", {"precision": "float32"}),
        Rival("engine auto", "engine", {"precision": "auto"}, short_runs=False),
        _torch("torch float32", "float32"),
        _torch("torch bfloat16", "bfloat16"),
        _torch("torch.compile float32", "float32", compiled=True),
        _graphs("ONNX Runtime float32", "onnxruntime", "float32"),
        _graphs("OpenVINO float32", "openvino", "float32"),
        _graphs("OpenVINO auto", "openvino", "auto"),
    ),
    "labels": (
        _after("labels", "zsseg_rt"),
        _after("labels", "torch argmax", "torch"),
        _after("labels", "torch max", "torch"),
        _after("labels", "torch.compile", "torch", "c++"),
        _after("labels", "OpenCV", "cv2", library="opencv"),
    ),
    "overlay": (
        _after("overlay", "zsseg_rt"),
        _after("overlay", "OpenCV", "cv2", library="opencv"),
        _after("overlay", "supervision", "supervision"),
    ),
}
"""By task; the first one is ours, and its results are what the others' are checked against."""

OURS = ("engine float32", "engine auto", "zsseg_rt")


def cases_of(group: str, *, quick: bool) -> Iterator[Case]:
    """The cases of a group; some belong to several groups and are measured once."""
    models: tuple[Model, ...] = ("demo",) if quick else ("real", "demo")
    threads = 1 if quick else THREADS
    if group == "engine":
        yield from (Case("frame", model, 20, VGA, threads) for model in models)
    elif group == "classes":
        for model, count in itertools.product(models, CLASSES[:1] if quick else CLASSES):
            yield Case("frame", model, count, VGA, threads)
    elif quick:
        yield from (Case(task, "", 20, SIZES[0], threads) for task in ("labels", "overlay"))
    else:
        for out_hw, counts in (
            (SIZES[1], CLASSES[1:]),
            (SIZES[2], CLASSES[1:3]),
            (SIZES[3], (20,)),
        ):
            yield from (Case("labels", "", count, out_hw, threads) for count in counts)
        yield from (Case("overlay", "", 20, out_hw, threads) for out_hw in (VGA, *SIZES[2:]))


def is_installed(need: str) -> bool:
    """Whether a key of :data:`INSTALL` is there."""
    if need == "c++":
        return any(map(shutil.which, ("c++", "g++", "clang++")))
    return importlib.util.find_spec(need) is not None


def missing_needs(rival: Rival, installed: Callable[[str], bool]) -> tuple[str, ...]:
    """The packages that a rival needs and that are not there."""
    return tuple(need for need in rival.needs if not installed(need))


def refused_memory(rival: Rival, case: Case, available_bytes: int) -> str:
    """Why a rival would need too much memory for a case; empty if it does not."""
    height, width = case.out_hw
    needed = case.classes * height * width * _BYTES_A_VALUE
    if not rival.full_logits or needed <= _SHARE_OF_MEMORY * available_bytes:
        return ""
    return f"its logits would take {needed / 1e9:.0f} GB"
