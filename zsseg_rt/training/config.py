"""A training run as a TOML file: strict, complete, and saved with the run."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zsseg_rt.common import schema
from zsseg_rt.common.checks import check_range
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets import SegmentationDataset, create_dataset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_RECIPES = Path(__file__).with_name("recipes")
# Settings that may change when a run is continued: no result depends on them.
_FREE = (
    "data.root", "loop.checkpoint_interval", "loop.device", "loop.keep_checkpoints",
    "loop.kept_steps", "loop.log_interval", "loop.num_pictures", "loop.num_workers",
    "output.folder", "text.space",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and what it starts from."""

    # "zegclip", "clip_rc", "cosine_head", "zegformer" or "zeroseg"; not needed with a run to start
    # from
    architecture: str = "zegclip"
    # A run's folder, one of its checkpoints, or an official checkpoint file, whose weights are
    # taken (optimizer, schedule and step start again); empty starts from options.pretrained
    start_from: str = ""
    # Keyword arguments of create_model, or, with an official file, of from_official; ZegFormer's
    # CLIP, which its official files do not hold, is named by pretrained, clip and activation as for
    # create_model. Seen classes and self-training follow from data and task and are not given here
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where class embeddings come from: a bank, or CLIP weights, or the model's text tower."""

    bank: str = ""  # .npy (float [C, D]) or .safetensors (tensor embeds) of embeddings
    # Names of the bank's rows: a text file, one per line, or a JSON list. Empty: rows are the data
    # set's classes in order
    bank_names: str = ""
    clip: str = ""  # CLIP weights, a file or an open_clip tag, whose text tower embeds the classes
    clip_architecture: str = "ViT-B-16"  # open_clip's name of the model, for a tag
    # "quick_gelu" or "gelu" for a file that does not say; or empty
    clip_activation: Literal["", "quick_gelu", "gelu"] = ""
    # Prompts with one {} each; embeddings are averaged over them
    templates: tuple[str, ...] = ("a photo of a {}.",)
    # Prompts of ZegFormer's second look, by CLIP at regions; empty takes its official 32
    region_templates: tuple[str, ...] = ()
    # Human-readable name of the joint space; empty names it after where embeddings come from: the
    # CLIP's tag, or a file and the beginning of its SHA-256
    space: str = ""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data to train on."""

    name: str  # Name of the data set; see :mod:`zsseg_rt.evaluation.datasets`
    root: str = ""  # Its folder
    split: str = "train"  # Split of the data set
    # Further keyword arguments of the data set
    options: dict[str, Any] = field(default_factory=dict)
    # kind ("fit_inside", "short_edge" or "center_crop") and the fields of that augmentation; see
    # transforms
    augmentation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The objective."""

    # What training may know of unseen classes: nothing ("inductive"), where they are
    # ("transductive", self-training), everything ("supervised")
    protocol: Literal["inductive", "transductive", "supervised"] = "inductive"
    # Further keyword arguments of the family's task, loss weights and learning rates; see tasks
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated. The task sets rates and decays of parameter groups."""

    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's betas
    eps: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float | None = None  # L2 norm to which gradients are clipped; None does not clip

    def __post_init__(self) -> None:
        check_range(self, "betas", most=1 - 1e-9)
        check_range(self, "eps", "max_grad_norm", least=1e-30)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how and where a run trains."""

    iterations: int = 20_000  # Optimizer steps of the whole run
    # Images per optimizer step, over all processes and accumulated parts. A run with more GPUs or
    # more accumulation is the same run
    batch_size: int = 16
    # Parts in which a process computes its share of the batch, to save memory
    accumulation_steps: int = 1
    # "float32", "bfloat16" or "float16" (GPU only, with loss scaling) of the model's computation;
    # weights and optimizer stay float32
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    seed: int = 0  # Seed of everything random
    # Whether to use slower algorithms that give the same bits every time
    deterministic: bool = False
    # Optimizer steps between checkpoints: the most that a crash can cost
    checkpoint_interval: int = 1000
    keep_checkpoints: int = 2  # How many of the last checkpoints are kept, besides the best one
    # Steps whose checkpoints are also kept, to start other runs from
    kept_steps: tuple[int, ...] = ()
    evaluation_interval: int = 0  # Optimizer steps between evaluations; 0 evaluates only at the end
    best_metric: str = "hIoU"  # The figure by whose highest value a checkpoint is the best
    log_interval: int = 50  # Optimizer steps between lines of the history
    num_pictures: int = 4  # Prediction images per evaluation in TensorBoard
    num_workers: int = 2  # Processes that read images, per training process; 0 reads in place

    def __post_init__(self) -> None:
        check_range(self, "iterations", "batch_size", "accumulation_steps", least=1)
        check_range(self, "checkpoint_interval", "keep_checkpoints", "log_interval", least=1)
        check_range(self, "seed", "evaluation_interval", "num_pictures", "num_workers")

    def part_size(self, num_processes: int) -> int:
        """Images that one process computes at a time."""
        parts = num_processes * self.accumulation_steps
        if self.batch_size % parts:
            raise ArgumentError(
                f"batch_size: expected a multiple of {parts} ({num_processes} processes times "
                f"{self.accumulation_steps} accumulation steps), got {self.batch_size}. "
                "Change one of the three."
            )
        return self.batch_size // parts


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run: a linear warm-up and a decay, as a factor in [0, 1].

    ``"poly"`` is mmcv's, as ZegCLIP configures it: its decay begins with the first step, and the
    warm-up multiplies it. ``"cosine"`` is MAE's and CLIP's: its decay begins after the warm-up.
    """

    name: Literal["poly", "cosine", "constant"] = "poly"  # "poly", "cosine" or "constant"
    power: float | None = None  # Exponent of "poly"; None means 0.9
    min_factor: float = 0.0  # Fraction of the peak rate at which the decay ends
    warmup_steps: int = 0  # Length of the linear warm-up
    # Fraction of the rate at the first step; None means 1e-6 for "poly", else 0
    warmup_start: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "warmup_steps")
        check_range(self, "min_factor", "warmup_start", most=1)
        unused = {"cosine": ("power",), "constant": ("power", "min_factor")}.get(self.name, ())
        for name in unused:
            if value := getattr(self, name):
                raise ArgumentError(f"{name}: expected none for {self.name!r}, got {value}.")

    def factor(self, step: int, iterations: int) -> float:
        """Factor of the peak rates at a step, from 0; steps beyond the last keep the last one."""
        steps, begin = self.warmup_steps, self.warmup_steps if self.name == "cosine" else 0
        if not 0 <= steps < max(iterations, 2):
            raise ArgumentError(
                f"warmup_steps: expected fewer than {iterations} iterations, got {steps}. "
                "Shorten the warm-up."
            )
        done = max(min(step, iterations) - begin, 0) / (iterations - begin)
        decay = 1.0
        if self.name == "poly":
            decay = (1 - done) ** (0.9 if self.power is None else self.power)
        elif self.name == "cosine":
            decay = (math.cos(math.pi * done) + 1) / 2
        factor = (1 - self.min_factor) * decay + self.min_factor
        start = self.warmup_start
        if start is None:
            start = 1e-6 if self.name == "poly" else 0.0
        return factor if step >= steps else factor * (1 - (1 - step / steps) * (1 - start))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How checkpoints are evaluated during training, which decides which one is best."""

    split: str = "val"  # Split of the training data set; empty does not evaluate
    # Replaces the training data's options for this split; None takes those
    options: dict[str, Any] | None = None
    # "whole" as in the runtime, or "slide" as for official figures
    protocol: Literal["whole", "slide"] = "whole"
    limit: int = 0  # At most this many images, spread evenly over the split; 0 takes all


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where the run is saved."""

    # Gets config.toml, checkpoints/, history.jsonl, evaluations.json, tensorboard/ and summary.json
    folder: str = "runs/run"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: a TOML file with a table for each attribute; only ``data`` is required."""

    data: DataConfig  # The data to train on
    model: ModelConfig = field(default_factory=ModelConfig)  # Which model
    text: TextConfig = field(default_factory=TextConfig)  # Class embeddings
    task: TaskConfig = field(default_factory=TaskConfig)  # What is learned
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # AdamW
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # Learning rate over the run
    loop: LoopConfig = field(default_factory=LoopConfig)  # How long, how and where
    # How checkpoints are evaluated
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)  # Where the run is saved

    def __post_init__(self) -> None:
        self.schedule.factor(0, self.loop.iterations)  # refuse bad settings before anything runs

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config") -> TrainConfig:
        """Build a config from plain data."""
        return schema.decode(cls, dict(raw), where, ArgumentError)

    @classmethod
    def load(cls, source: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
        """Read a TOML file or a recipe of the package."""
        raw, where = read_toml(source, _RECIPES)
        for change in changes:
            apply_change(raw, change)
        return cls.from_dict(raw, where)

    def open_data(self, use: Literal["training", "evaluation"]) -> SegmentationDataset:
        """Open the split that is trained on, or the one that checkpoints are evaluated on."""
        data, judged = self.data, self.evaluation
        split, options = data.split, data.options
        if use == "evaluation":
            split = judged.split
            options = options if judged.options is None else judged.options
        return create_dataset(data.name, data.root or None, split, **options)

    def to_toml(self) -> str:
        """Every setting, including defaults; :meth:`load` reads it back."""
        lines = []
        for table, fields in schema.encode(self).items():
            settings = ((k, v) for k, v in fields.items() if v is not None)
            lines += [f"[{table}]", *(f"{k} = {_toml_value(v)}" for k, v in settings), ""]
        return "\n".join(lines)

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the settings whose values differ and affect results."""
        names = [
            f"{table}.{name}"
            for table, fields in vars(self).items()
            for name, value in vars(fields).items()
            if value != getattr(getattr(other, table), name)
        ]
        return [name for name in names if name not in _FREE]


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package: the papers' settings."""
    return list_kept(_RECIPES)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else _toml_text(key)


def _toml_text(value: Any) -> str:
    """As JSON has it; TOML also wants the one control character escaped that JSON does not."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    return _toml_text(value)


def read_toml(source: str | Path, kept_in: Path) -> tuple[dict[str, Any], str]:
    """Read a TOML file, or one that comes with the package, laid over the kept one it names."""
    text, where = _read_source(source, kept_in)
    try:
        tables = _parse(text, where)
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"{where}: expected valid TOML, got an error: {error}") from error
    if "base" not in tables:
        return tables, where
    base = tables.pop("base")
    if not isinstance(base, str) or base not in (path.stem for path in kept_in.glob("*.toml")):
        raise ArgumentError(
            f"{where}: base: expected one of the {kept_in.name} {', '.join(list_kept(kept_in))}, "
            f"got {_short(repr(base))}. Check the spelling, or leave it out."
        )
    return merge(read_toml(kept_in / f"{base}.toml", kept_in)[0], tables), where


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay tables over tables; values and lists are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def list_kept(kept_in: Path) -> list[str]:
    """Names of the TOML files in a folder of the package, but for those that others build on."""
    return sorted(path.stem for path in kept_in.glob("[!_]*.toml"))


def _read_source(source: str | Path, kept_in: Path) -> tuple[str, str]:
    path, recipe = Path(source), kept_in / f"{source}.toml"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
        if path.name == str(source) and recipe.is_file():
            return recipe.read_text(encoding="utf-8"), f"{kept_in.name.removesuffix('s')} {source}"
    except (OSError, ValueError) as error:  # also a name that no file can have
        raise ArgumentError(f"{_short(path)}: cannot be read: {_short(error)}") from error
    raise ArgumentError(
        f"config: expected a TOML file or one of the {kept_in.name} "
        f"{', '.join(list_kept(kept_in))}, got {str(source)!r}. Check the path."
    )


def apply_change(raw: dict[str, Any], change: str) -> None:
    """Set ``table.key=value`` in plain data."""
    path, equals, text = change.partition("=")
    *tables, name = (key.strip() for key in path.split("."))
    if not equals or not all((*tables, name)):
        raise ArgumentError(f"--set: expected table.key=value, got {_short(repr(change))}")
    where = f"--set {_short(path)}"
    try:
        value = _parse(f"value = {text}", where)["value"]
    except tomllib.TOMLDecodeError:
        value = _parse(f"value = {_toml_text(text.strip())}", where)["value"]
    table = raw
    for key in tables:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ArgumentError(f"{where}: expected a table at {key!r}, got a value")
    table[name] = value


def _parse(text: str, where: str) -> dict[str, Any]:
    """Read TOML, of which JSON's values are settings: no dates, no nan, no deep nesting."""
    try:
        plain = json.dumps(tomllib.loads(text), allow_nan=False)
        tables: dict[str, Any] = schema.parse_json(plain.encode())
    except tomllib.TOMLDecodeError:
        raise
    except (RecursionError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"{where}: expected text, numbers, true or false in a few lists and tables, got "
            f"another value ({_short(error)}). Put text in quotes."
        ) from error
    return tables


def _short(text: object) -> str:
    return str(text) if len(str(text)) <= 80 else f"{str(text)[:77]}..."
