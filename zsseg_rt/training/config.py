"""A training run as a TOML file: strict, complete, and saved with the run."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zsseg_rt.common import schema
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets import SegmentationDataset, create_dataset
from zsseg_rt.training.loop.config import LoopConfig, OptimizerConfig, ScheduleConfig

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
