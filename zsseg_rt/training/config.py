"""A training run as a TOML file: strict, complete, and saved with the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from zsseg_rt.common import schema
from zsseg_rt.common.argument_names import current_name
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets import SegmentationDataset, create_dataset
from zsseg_rt.training.loop.config import LoopConfig, OptimizerConfig
from zsseg_rt.training.toml_files import apply_change, list_kept, read_toml

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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and what it starts from.

    Attributes:
        architecture: ``"zegclip"``, ``"clip_rc"``, ``"cosine_head"``, ``"zegformer"`` or
            ``"zeroseg"``; not needed with a run to start from.
        start_from: A run's folder, one of its checkpoints, or an official checkpoint file, whose
            weights are taken (optimizer, schedule and step start again); empty starts from
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

    @staticmethod
    def from_earlier(raw: Mapping[str, Any]) -> dict[str, Any]:
        """What earlier versions wrote, in today's words."""
        named = raw.get("architecture")
        return dict(raw) | ({"architecture": current_name(named)} if isinstance(named, str) else {})


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where class embeddings come from: a bank, or CLIP weights, or the model's text tower.

    Attributes:
        bank: ``.npy`` (float ``[C, D]``) or ``.safetensors`` (tensor ``embeds``) of embeddings.
        bank_names: Names of the bank's rows: a text file, one per line, or a JSON list. Empty:
            rows are the data set's classes in order.
        clip: CLIP weights, a file or an open_clip tag, whose text tower embeds the classes.
        clip_architecture: open_clip's name of the model, for a tag.
        clip_activation: ``"quick_gelu"`` or ``"gelu"`` for a file that does not say; or empty.
        templates: Prompts with one ``{}`` each; embeddings are averaged over them.
        region_templates: Prompts of ZegFormer's second look, by CLIP at regions; empty takes its
            official 32.
        space: Human-readable name of the joint space; empty names it after where embeddings come
            from: the CLIP's tag, or a file and the beginning of its SHA-256.
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
    """The data to train on.

    Attributes:
        name: Name of the data set; see :mod:`zsseg_rt.evaluation.datasets`.
        root: Its folder.
        split: Split of the data set.
        options: Further keyword arguments of the data set.
        augmentation: ``kind`` (``"fit_inside"``, ``"short_edge"`` or ``"center_crop"``) and the
            fields of that augmentation; see :mod:`zsseg_rt.training.data.transforms`.
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
    """The learning rate over the run; see :mod:`zsseg_rt.training.loop.schedules`.

    Attributes:
        name: ``"poly"``, ``"cosine"`` or ``"constant"``.
        power: Exponent of ``"poly"``; None means 0.9.
        min_factor: Fraction of the peak rate at which the decay ends.
        warmup_steps: Length of the linear warm-up.
        warmup_start: Fraction of the rate at the first step; None takes the schedule's own.
    """

    name: Literal["poly", "cosine", "constant"] = "poly"
    power: float | None = None
    min_factor: float = 0.0
    warmup_steps: int = 0
    warmup_start: float | None = None

    def factor(self, step: int, iterations: int) -> float:
        """Factor of the peak rates at a step."""
        from zsseg_rt.training.loop import schedules

        fields: dict[str, Any] = dict(vars(self))
        name = fields.pop("name")
        given = {key: value for key, value in fields.items() if value is not None}
        for key in ("min_factor", "warmup_steps"):  # 0 is the schedules' default
            if not given[key]:
                del given[key]
        return schedules.factor(name, step, max_steps=iterations, **given)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How checkpoints are evaluated during training, which decides which one is best.

    Attributes:
        split: Split of the training data set; empty does not evaluate.
        options: Replaces the training data's options for this split; None takes those.
        protocol: ``"whole"`` as in the runtime, or ``"slide"`` as for official figures.
        limit: At most this many images, spread evenly over the split; 0 takes all.
    """

    split: str = "val"
    options: dict[str, Any] | None = None
    protocol: Literal["whole", "slide"] = "whole"
    limit: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where the run is saved.

    Attributes:
        folder: Gets ``config.toml``, ``checkpoints/``, ``history.jsonl``, ``evaluations.json``,
            ``tensorboard/`` and ``summary.json``.
    """

    folder: str = "runs/run"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: a TOML file with a table for each attribute; only ``data`` is required.

    Attributes:
        data: The data to train on.
        model: Which model.
        text: Class embeddings.
        task: What is learned.
        optimizer: AdamW.
        schedule: Learning rate over the run.
        loop: How long, how and where.
        evaluation: How checkpoints are evaluated.
        output: Where the run is saved.
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
