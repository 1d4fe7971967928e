"""A training run as a TOML file: strict, complete, and saved with the run."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zsseg_rt.common import schema
from zsseg_rt.common.checks import current_name
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets import SegmentationDataset, create_dataset
from zsseg_rt.training.loop.config import (
    LoopConfig,
    OptimizerConfig,
    constant,
    cosine,
    poly,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_RECIPES = resources.files("zsseg_rt.training") / "recipes"
CONFIG_FILE = "config.toml"
DataUse = Literal["training", "evaluation"]
# Settings that may change when a run is continued: no result depends on them.
_FREE = {
    ("data", "root"),
    ("loop", "checkpoint_interval"),
    ("loop", "device"),
    ("loop", "keep_checkpoints"),
    ("loop", "kept_steps"),
    ("loop", "log_interval"),
    ("loop", "num_pictures"),
    ("loop", "num_workers"),
    ("output", "folder"),
    ("text", "space"),
}
_SCHEDULES: Mapping[str, Callable[..., float]] = {
    "poly": poly,
    "cosine": cosine,
    "constant": constant,
}
_MAX_DEPTH = 20  # of lists and tables inside each other


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

    @staticmethod
    def from_earlier(raw: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as earlier versions wrote them, in today's words."""
        named = raw.get("architecture")
        return dict(raw) | ({"architecture": current_name(named)} if isinstance(named, str) else {})


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
class ScheduleConfig:
    """The learning rate over the run; see :mod:`zsseg_rt.training.loop.config`."""

    name: Literal["poly", "cosine", "constant"] = "poly"  # "poly", "cosine" or "constant"
    power: float | None = None  # Exponent of "poly"; None means 0.9
    min_factor: float = 0.0  # Fraction of the peak rate at which the decay ends
    warmup_steps: int = 0  # Length of the linear warm-up
    # Fraction of the rate at the first step; None takes the schedule's own
    warmup_start: float | None = None

    def factor(self, step: int, iterations: int) -> float:
        """Factor of the peak rates at a step."""
        settings = {key: value for key, value in vars(self).items() if value is not None}
        for key in ("min_factor", "warmup_steps"):  # 0 is the schedules' default
            if not settings[key]:
                del settings[key]
        schedule = _SCHEDULES[settings.pop("name")]
        unknown = [key for key in settings if key not in inspect.signature(schedule).parameters]
        if unknown:
            raise ArgumentError(
                f"schedule: expected the settings of {self.name}, got others: "
                f"{', '.join(unknown)}. Check the spelling."
            )
        return schedule(step, max_steps=iterations, **settings)


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

    def open_data(self, use: DataUse) -> SegmentationDataset:
        """Open the split that is trained on, or the one that checkpoints are evaluated on."""
        data, judged = self.data, self.evaluation
        split, options = data.split, data.options
        if use == "evaluation":
            split = judged.split
            options = options if judged.options is None else judged.options
        return create_dataset(data.name, data.root or None, split, **options)

    def to_toml(self) -> str:
        """Every setting, including defaults; :meth:`load` reads it back."""
        plain = {
            table: {k: v for k, v in fields.items() if v is not None}
            for table, fields in schema.encode(self).items()
        }
        return "\n".join(_toml_table((name,), fields) for name, fields in plain.items())

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the settings whose values differ and affect results."""
        return [
            f"{table}.{name}"
            for table, fields in vars(self).items()
            for name, value in vars(fields).items()
            if value != getattr(getattr(other, table), name) and (table, name) not in _FREE
        ]


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package: the papers' settings."""
    return list_kept(_RECIPES)


def _toml_table(path: tuple[str, ...], fields: Mapping[str, Any]) -> str:
    """A table: first its plain values, then its tables."""
    tables = {key: value for key, value in fields.items() if isinstance(value, Mapping)}
    plain = [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in fields.items() if k not in tables]
    head = "\n".join([f"[{'.'.join(map(_toml_key, path))}]", *plain, ""])
    return "\n".join([head, *(_toml_table((*path, key), value) for key, value in tables.items())])


def _toml_key(key: str) -> str:
    plain = key.replace("_", "").replace("-", "")
    return key if plain.isascii() and plain.isalnum() else _toml_text(key)


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


def read_toml(source: str | Path, kept_in: Traversable) -> tuple[dict[str, Any], str]:
    """Read a TOML file, or one that comes with the package, laid over the kept one it names."""
    text, where = _read_source(source, kept_in)
    try:
        tables = _parse(text, where)
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"{where}: expected valid TOML, got an error: {error}") from error
    _check(tables, where)
    if "base" not in tables:
        return tables, where
    base = tables.pop("base")
    if not isinstance(base, str) or base not in _kept_names(kept_in):
        raise ArgumentError(
            f"{where}: base: expected one of the {kept_in.name} {', '.join(list_kept(kept_in))}, "
            f"got {_short(repr(base))}. Check the spelling, or leave it out."
        )
    return merge(read_toml(str(kept_in / f"{base}.toml"), kept_in)[0], tables), where


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay tables over tables; values and lists are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def list_kept(kept_in: Traversable) -> list[str]:
    """Names of the TOML files in a folder of the package, but for those that others build on."""
    return sorted(name for name in _kept_names(kept_in) if not name.startswith("_"))


def _kept_names(kept_in: Traversable) -> list[str]:
    names = (entry.name for entry in kept_in.iterdir())
    return [name.removesuffix(".toml") for name in names if name.endswith(".toml")]


def _read_source(source: str | Path, kept_in: Traversable) -> tuple[str, str]:
    path = Path(source)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{_short(path)}: cannot be read: {_short(error)}") from error
    recipe = kept_in / f"{source}.toml"
    if path.suffix == "" and path.name == str(source) and recipe.is_file():
        return recipe.read_text(encoding="utf-8"), f"{kept_in.name.removesuffix('s')} {source}"
    raise ArgumentError(
        f"config: expected a TOML file or one of the {kept_in.name} "
        f"{', '.join(list_kept(kept_in))}, got {str(source)!r}. Check the path."
    )


def apply_change(raw: dict[str, Any], change: str) -> None:
    """Set ``table.key=value`` in plain data."""
    path, equals, text = change.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ArgumentError(f"--set: expected table.key=value, got {_short(repr(change))}")
    if len(keys) > _MAX_DEPTH:
        raise _odd("--set", "more")
    try:
        value = _parse(f"value = {text}", f"--set {_short(path)}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    _check(value, "--set", 1)
    table = raw
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ArgumentError(f"--set: expected a table at {key!r} of {path!r}, got a value")
    table[keys[-1]] = value


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # Python refuses integers of thousands of digits
        deep = isinstance(error, RecursionError)
        raise _odd(where, "more" if deep else "a larger one") from error


def _check(value: Any, where: str, depth: int = 0) -> None:
    """Refuse valid TOML that is never a setting: dates, nan, deep nesting, text not of Unicode."""
    if depth >= _MAX_DEPTH:
        raise _odd(where, "more")
    if isinstance(value, (list, dict)):
        for item in (*value, *(value.values() if isinstance(value, dict) else ())):
            _check(item, where, depth + 1)
        return
    if isinstance(value, str):
        is_odd = any("\ud800" <= letter <= "\udfff" for letter in value)
    elif isinstance(value, int):
        is_odd = not -(2**63) <= value < 2**63
    else:
        is_odd = not isinstance(value, float) or math.isnan(value)  # which differs from itself
    if is_odd:
        kind = "" if isinstance(value, (str, int, float)) else f"the {type(value).__name__} "
        raise _odd(where, f"{kind}{_short(ascii(str(value))[1:-1])}")


def _odd(where: str, value: str) -> ArgumentError:
    return ArgumentError(
        f"{where}: expected text, numbers, 64-bit integers, true or false, and at most "
        f"{_MAX_DEPTH} lists and tables inside each other, got {value}. Put text in quotes."
    )


def _short(text: object) -> str:
    return str(text) if len(str(text)) <= 80 else f"{str(text)[:77]}..."
