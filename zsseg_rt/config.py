"""Settings of an :class:`~zsseg_rt.Engine`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsseg_rt.common import schema
from zsseg_rt.common.checks import canonical_device, check_device_name
from zsseg_rt.common.files import default_cache_dir
from zsseg_rt.common.process import threads_in_quota
from zsseg_rt.common.settings import (
    Option,
    check_settings,
    documented,
    in_unit,
    one_of,
    setting,
    within,
)
from zsseg_rt.errors import ConfigError

BACKENDS = ("auto", "openvino", "tensorrt", "torch")
PRECISIONS = ("auto", "float32", "float16", "bfloat16", "int8", "fp8")
MAX_THREADS = 1024
MAX_LANES = 64
MAX_MEMORY = 10_000_000  # MB
MAX_WINDOWS = 1000
_FEW_CPUS = 8
_WINDOWS = re.compile(r"auto|[0-9]{1,5}x[0-9]{1,5}\+[0-9]{1,5}")
_PRECISION_WORDS = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def _check_path(name: str, value: Any) -> None:
    if "\0" in str(value):
        raise ConfigError(f"{name}: expected a path, got {str(value)!r}")


def _check_windows(name: str, value: Any) -> None:
    if not isinstance(value, str) or not _WINDOWS.fullmatch(value):
        raise ConfigError(
            f"{name}: expected 'auto', 'HxW+S' such as '448x448+224', or None, got "
            f"{str(value)[:40]!r}"
        )


@documented
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and how an engine runs. You get what you ask for, or an error.

    Raises:
        ConfigError: A value is not one of the above; the message lists them.
    """

    device: str = setting(
        "auto",
        '``"auto"``, ``"cpu"`` or ``"cuda:N"``; ``"cuda"`` is the first. ``auto`` reads '
        "``$ZSSEG_DEVICE``, then takes the first GPU that a backend can use, otherwise the CPU.",
        "auto, cpu or cuda:N.",
        check=check_device_name,
    )
    backend: str = setting(
        "auto",
        '``"auto"``, ``"openvino"``, ``"tensorrt"`` or ``"torch"``. ``auto`` reads '
        "``$ZSSEG_BACKEND``, then takes OpenVINO on the CPU, TensorRT (else torch) on CUDA.",
        ", ".join(BACKENDS),
        check=one_of(*BACKENDS),
    )
    precision: str = setting(
        "auto",
        '``"auto"`` or a precision: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"int8"``, '
        '``"fp8"``; ``auto`` takes the backend\'s fastest safe one, which for family '
        '``segment_tokens`` is float32. ``"fp16"``, ``"bf16"`` and ``"fp32"`` become their long '
        "names.",
        ", ".join(PRECISIONS),
        check=one_of(*PRECISIONS),
    )
    channel_order: str = setting(
        "rgb",
        'Order of a frame\'s last axis, ``"rgb"`` or ``"bgr"`` (OpenCV\'s frames), in any case.',
        check=one_of("rgb", "bgr"),
    )
    with_scores: bool = setting(False, "Whether results carry per-pixel scores.")
    with_class_scores: str | None = setting(
        None,
        "``\"low\"`` gives results a map of every class's score at the resolution of the bundle's "
        "grid, ``Segmentation.class_scores``; None leaves it out.",
        check=one_of("low", end=", or None"),
    )
    unknown_below: float | None = setting(
        None,
        "Score in [0, 1] below which a pixel is unknown; None takes the bundle's.",
        "Score in [0, 1] below which a pixel is unknown.",
        check=in_unit("a score"),
    )
    min_region_score: float | None = setting(
        None,
        "For bundles of family ``proposals``: segments whose probability of being any class is "
        "lower are judged by their own scores alone, which saves CLIP's look at them; 0 looks at "
        "all of them, as published. Empty segments never cost a look of their own. None takes the "
        "bundle's.",
        "ZegFormer: CLIP runs only on regions at least this likely to be any class; 0 is exact, "
        "larger values are faster.",
        check=in_unit("a probability"),
    )
    head_classes: str | None = setting(
        None,
        "For bundles of family ``aggregation``, of more phrases than the bundle shows its head at "
        'once (CAT-Seg: 256): ``"best"`` shows it those that correlate most with some patch of '
        'the frame, as published; ``"all"`` shows it all of them, in parts and with exact sums, '
        "which is not what it was trained with. None takes the bundle's.",
        "CAT-Seg with more than 256 names: best gives its head the 256 nearest to the frame, as "
        "published; all gives it all.",
        check=one_of("best", "all", end=", or None"),
    )
    max_candidates: int | None = setting(
        None,
        "For bundles of families ``dense``, ``descriptor`` and ``aggregation``: of more classes "
        "than this, each frame is labelled with those that are nearest to some cell of it; "
        "``Segmentation.candidates`` names them. With a ``FrameMemory``, a class that the frame "
        "before kept stays while it ranks among half as many more. None labels with all.",
        "With more names than this, label each frame only with those nearest to it.",
        check=within(1, 1 << 20, "None labels with all"),
    )
    windows: str | None = setting(
        None,
        "For bundles of families ``dense`` and ``descriptor``: None stretches frames to the "
        'bundle\'s size, unless the bundle asks for ``"auto"``, as the photo demo does. With '
        '``"auto"`` frames keep their shape: the shorter side is resized to the bundle\'s, and '
        'overlapping windows are laid along the longer one. ``"HxW+S"`` cuts windows of the '
        "bundle's size H by W from the frame as it is, S pixels apart. A frame is as many runs of "
        "the networks as it has windows.",
        "auto, or HEIGHTxWIDTH+STRIDE: keep a frame's shape and label overlapping windows of it.",
        check=_check_windows,
    )
    max_windows: int = setting(
        16,
        "The most windows that a frame may take, from 1 to 1000; one that would take more, such as "
        "a long thin one, keeps its shape in one window. ``evaluate`` allows 1000.",
        "Label a frame that would take more windows in one.",
        check=within(1, MAX_WINDOWS, "1 lays none"),
    )
    resize: str | None = setting(
        None,
        '``"letterbox"`` keeps a frame\'s shape in one window and repeats its edge in the room '
        'beside it; ``"stretch"`` stretches the frame, whatever the bundle asks for. For the same '
        "families.",
        "letterbox keeps a frame's shape in one window, stretch does not; default: the bundle's.",
        check=one_of("stretch", "letterbox", end=", or None"),
    )
    num_threads: int = setting(
        0,
        "CPU threads of this engine; 0 takes all that the process may use: its affinity, or a "
        'container\'s quota of CPU time, rounded up. For backend ``"torch"`` it applies to the '
        "whole process: the engine made last decides.",
        Option("CPU threads; 0 = all.", ("--threads",)),
        check=within(0, MAX_THREADS, "0 takes all CPUs"),
    )
    num_lanes: int = setting(
        1,
        "Frames that can be labelled at the same time, each in a lane of its own; see "
        ":meth:`Engine.lane`. On the CPU they share ``num_threads``.",
        check=within(1, MAX_LANES, "1 labels one frame at a time"),
    )
    wait: str = setting(
        "auto",
        'How a thread waits for the GPU: ``"sleep"`` leaves its CPU core to others, ``"spin"`` '
        'keeps it busy and sees the end some microseconds earlier. ``"auto"`` sleeps where the '
        "process has at most eight CPUs, and on a GPU that shares the CPU's memory (Jetson).",
        check=one_of("auto", "sleep", "spin"),
    )
    with_times: bool | None = setting(
        None,
        "Whether results carry the times of their stages. None times stages on the CPU and on a "
        "GPU the whole frame alone, by the host's clock: each stage there would cost an event on "
        "the GPU.",
    )
    with_node_times: bool = setting(
        False,
        "Whether :meth:`Engine.node_times` can time the nodes of the graphs, which costs every "
        "frame a little time.",
    )
    with_nvtx: bool = setting(
        False,
        "Whether frames and their stages are NVTX ranges, which Nsight Systems shows; needs the "
        "extra ``nvtx``.",
    )
    cache_dir: str | Path | None = setting(
        None,
        "Folder for compiled models, plans and text embeddings; None takes ``$ZSSEG_HOME``, else "
        "the user's cache folder.",
        check=_check_path,
    )
    use_cache: bool = setting(True, "False neither reads nor writes any cache.")
    keep_text_encoder: bool = setting(
        True,
        "False frees the text encoder as soon as new phrases are embedded; the next new phrase "
        "loads it again. CLIP ViT-B/16's takes about 0.6 GB.",
    )
    max_memory: int | None = setting(
        None,
        "Most MB (of 1,000,000 bytes) that the networks may take: weights, the text encoder, and "
        "every lane's activations, on the device and the host together, as boards share them. An "
        "engine that is expected to take more is not made: the error says which precision, number "
        "of lanes or input size would fit. Libraries, and TensorRT while it builds, come on top. "
        "None: no limit.",
        check=within(1, MAX_MEMORY, "MB; None: no limit"),
    )

    def __post_init__(self) -> None:
        self._take_other_spellings()
        check_settings(self)
        if self.windows is not None and self.resize == "letterbox":
            raise ConfigError(
                "resize: expected None beside windows, which keep a frame's shape, got "
                "'letterbox'. Leave one of them out."
            )

    def _take_other_spellings(self) -> None:
        """Write what is meant beyond doubt as it is written everywhere else."""
        for name in ("backend", "precision", "channel_order"):
            if isinstance(text := getattr(self, name), str):
                object.__setattr__(self, name, text.lower())
        object.__setattr__(self, "device", canonical_device(self.device))
        precision = _PRECISION_WORDS.get(str(self.precision), self.precision)
        object.__setattr__(self, "precision", precision)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> EngineConfig:
        """Build a config from plain data; an unknown key is an error that lists the known ones."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"EngineConfig: expected a dict, got {type(raw).__name__}")
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in raw.items()}
        return schema.decode(cls, plain, "EngineConfig", ConfigError)

    @property
    def sleeps(self) -> bool | None:
        """Whether threads sleep while they wait for the GPU; None where that is for it to say."""
        if self.wait == "auto":
            return True if threads_in_quota() <= _FEW_CPUS else None
        return self.wait == "sleep"

    @property
    def cache_folder(self) -> Path | None:
        """The cache folder in force, or None when caching is off."""
        if not self.use_cache:
            return None
        return default_cache_dir() if self.cache_dir is None else Path(self.cache_dir)
