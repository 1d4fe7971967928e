"""What a training run is, as a TOML file: strict, complete, and saved with the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from zsseg_rt import schema
from zsseg_rt.errors import ArgumentError
from zsseg_rt.training.loop_config import LoopConfig, OptimizerConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "CONFIG_FILE",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OutputConfig",
    "ScheduleConfig",
    "TaskConfig",
    "TextConfig",
    "TrainConfig",
    "list_kept",
    "list_recipes",
    "read_toml",
]

CONFIG_FILE = "config.toml"
# Settings that may differ between a run and its continuation: no result depends on them.
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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and from what it starts.

    Attributes:
        architecture: ``"zegclip"``, ``"clip_rc"``, ``"dense_clip"``, ``"zegformer"`` or
            ``"zeroseg"``; not needed with a run to start from.
        start_from: A run's folder, one of its checkpoints, or an official checkpoint file, whose
            weights are taken (optimizer, schedule and step start anew); empty starts from
            ``options.pretrained``.
        options: Keyword arguments of :func:`zsseg_rt.models.create_model`, or, with an official
            file, of :func:`zsseg_rt.models.from_official`; ZegFormer's CLIP, which its official
            files do not hold, is named by ``pretrained``, ``clip`` and ``activation`` as for
            :func:`zsseg_rt.models.create_model`. Seen classes and self-training follow from data
            and task and are not given here.
    """

    architecture: str = "zegclip"
    start_from: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where class embeddings come from: a bank, else CLIP weights, else the model's text tower.

    Attributes:
        bank: ``.npy`` (float ``[C, D]``) or ``.safetensors`` (tensor ``embeds``) of embeddings.
        bank_names: Names of the bank's rows: a text file with one a line, or a JSON list. Empty:
            rows are the data set's classes in order.
        clip: CLIP weights, a file or an open_clip tag, whose text tower embeds the classes.
        clip_architecture: open_clip's name of the model, for a tag.
        clip_activation: ``"quick_gelu"`` or ``"gelu"``, for a file that does not say; else empty.
        templates: Prompts with one ``{}`` each; embeddings are averaged over them.
        region_templates: Prompts of ZegFormer's second look, by CLIP at regions; empty is its
            official 32.
        space: Name of the joint space, for people; empty names it after where embeddings come from:
            the CLIP's tag, or a file and the beginning of its SHA-256.
    """

    bank: str = ""
    bank_names: str = ""
    clip: str = ""
    clip_architecture: str = "ViT-B-16"
    clip_activation: Literal["", "quick_gelu", "gelu"] = ""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    region_templates: tuple[str, ...] = ()
    space: str = ""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Attributes:
        name: Of the data set; see :mod:`zsseg_rt.training.datasets`.
        root: Its folder; empty for sets that are made, not read.
        split: Of the data set.
        options: Further keyword arguments of the data set.
        augmentation: ``kind`` (``"fit_inside"``, ``"short_edge"`` or ``"center_crop"``) and the
            fields of that augmentation; see :mod:`zsseg_rt.training.transforms`.
    """

    name: str
    root: str = ""
    split: str = "train"
    options: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is learned.

    Attributes:
        protocol: What training may know of unseen classes: nothing (``"inductive"``), where they
            are (``"transductive"``, self-training), everything (``"supervised"``).
        options: Further keyword arguments of the family's task, loss weights and learning rates;
            see :mod:`zsseg_rt.training.tasks`.
    """

    protocol: Literal["inductive", "transductive", "supervised"] = "inductive"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run; see :mod:`zsseg_rt.training.schedules`.

    Attributes:
        name: ``"poly"``, ``"cosine"`` or ``"constant"``.
        power: Exponent of ``"poly"``; None is 0.9.
        min_factor: Part of the peak rate that the decay ends at.
        warmup_steps: Length of the linear warm-up.
        warmup_start: Part of the rate at its first step; None is the schedule's own.
    """

    name: Literal["poly", "cosine", "constant"] = "poly"
    power: float | None = None
    min_factor: float = 0.0
    warmup_steps: int = 0
    warmup_start: float | None = None

    def factor(self, step: int, iterations: int) -> float:
        """Factor of the peak rates at a step.

        Raises:
            ArgumentError: A setting is out of its range or not the schedule's.
        """
        from zsseg_rt.training import schedules

        fields: dict[str, Any] = dict(vars(self))
        name = fields.pop("name")
        given = {key: value for key, value in fields.items() if value is not None}
        for key in ("min_factor", "warmup_steps"):  # 0 is what schedules do without being told
            if not given[key]:
                del given[key]
        return schedules.factor(name, step, max_steps=iterations, **given)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How checkpoints are judged while training; which one is the best follows from it.

    Attributes:
        split: Of the data set that is trained on; empty does not evaluate.
        options: Instead of the training data's options, for this split; None takes those.
        protocol: ``"whole"`` as the runtime does, or ``"slide"`` as official figures are made.
        limit: Pictures to take, spread evenly over the split; 0 is all.
    """

    split: str = "val"
    options: dict[str, Any] | None = None
    protocol: Literal["whole", "slide"] = "whole"
    limit: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where the run goes.

    Attributes:
        folder: Gets ``config.toml``, ``checkpoints/``, ``history.jsonl``, ``evaluations.json``,
            ``tensorboard/`` and ``summary.json``.
    """

    folder: str = "runs/run"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: a TOML file with a table for each attribute; only ``data`` is required.

    Attributes:
        data: What is trained on.
        model: Which model.
        text: Class embeddings.
        task: What is learned.
        optimizer: AdamW.
        schedule: Learning rate over the run.
        loop: How long, how and where.
        evaluation: How checkpoints are judged.
        output: Where the run goes.
    """

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        self.schedule.factor(0, self.loop.iterations)  # refuse bad settings before anything runs

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config") -> TrainConfig:
        """Build a config from plain data.

        Raises:
            ArgumentError: A key is unknown (the message gives the nearest known one), missing, or
                its value is of the wrong type or out of range.
        """
        return schema.decode(cls, dict(raw), where, ArgumentError)

    @classmethod
    def load(cls, source: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
        """Read a TOML file or a recipe of the package.

        Args:
            source: A file, or a recipe's name; see :func:`list_recipes`.
            changes: ``"table.key=value"`` each, with a TOML value (a bare word is a string).

        Raises:
            ArgumentError: There is no such file or recipe, it is no TOML, or a setting is wrong.
        """
        raw, where = read_toml(source, "recipes")
        for change in changes:
            _apply(raw, change)
        return cls.from_dict(raw, where)

    def to_toml(self) -> str:
        """Every setting, defaults too; :meth:`load` reads it back."""
        plain = {
            table: {k: v for k, v in fields.items() if v is not None}
            for table, fields in schema.encode(self).items()
        }
        return "\n".join(_toml_table((name,), fields) for name, fields in plain.items())

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the settings whose values differ and decide results."""
        return [
            f"{table}.{name}"
            for table, fields in vars(self).items()
            for name, value in vars(fields).items()
            if value != getattr(getattr(other, table), name) and (table, name) not in _FREE
        ]


def list_recipes() -> list[str]:
    """Names of the recipes that the package brings: the papers' settings."""
    return list_kept("recipes")


def read_toml(source: str | Path, kept_in: str) -> tuple[dict[str, Any], str]:
    """Read a TOML file, or one that the package brings.

    Args:
        source: A file, or the name of one in the package's folder.
        kept_in: The package's folder: ``"recipes"`` or ``"comparisons"``.

    Returns:
        Its tables, and what to call it in messages.

    Raises:
        ArgumentError: There is no such file, or it is no TOML.
    """
    text, where = _read_source(source, kept_in)
    try:
        return tomllib.loads(text), where
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"{where}: expected TOML, got an error: {error}") from error


def list_kept(kept_in: str) -> list[str]:
    """Names of the TOML files in a folder of the package."""
    folder = resources.files("zsseg_rt.training") / kept_in
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _read_source(source: str | Path, kept_in: str) -> tuple[str, str]:
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"{path}: cannot be read: {error}") from error
    kept = resources.files("zsseg_rt.training") / kept_in / f"{source}.toml"
    if path.suffix == "" and path.name == str(source) and kept.is_file():
        return kept.read_text(encoding="utf-8"), f"{kept_in.removesuffix('s')} {source}"
    raise ArgumentError(
        f"config: expected a TOML file or one of the {kept_in} {', '.join(list_kept(kept_in))}, "
        f"got {str(source)!r}. Check the path."
    )


def _apply(raw: dict[str, Any], change: str) -> None:
    """Set ``table.key=value`` in plain data."""
    path, equals, text = change.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ArgumentError(f"--set: expected table.key=value, got {change!r}")
    table = raw
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ArgumentError(f"--set: expected a table at {key!r} of {path!r}, got a value")
    try:
        table[keys[-1]] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[keys[-1]] = text.strip()


def _toml_table(path: tuple[str, ...], fields: Mapping[str, Any]) -> str:
    """A table, its plain values first, then its tables."""
    lines = [f"[{'.'.join(_toml_key(part) for part in path)}]"]
    lines += [
        f"{_toml_key(key)} = {_toml_value(value)}"
        for key, value in fields.items()
        if not isinstance(value, Mapping)
    ]
    tables = [
        _toml_table((*path, key), value)
        for key, value in fields.items()
        if isinstance(value, Mapping)
    ]
    return "\n".join(["\n".join(lines) + "\n", *tables])


def _toml_key(key: str) -> str:
    plain = key.replace("_", "").replace("-", "")
    return key if plain.isascii() and plain.isalnum() else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
