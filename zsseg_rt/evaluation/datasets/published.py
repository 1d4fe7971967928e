"""Published data sets; ``tables/*.json`` say where each comes from, and its files and classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from zsseg_rt.common import schema
from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets.base import ClassTable
from zsseg_rt.evaluation.datasets.files import FileDataset, LabelTable, Layout

Remake = Callable[[ClassTable], ClassTable]


@cache
def _table(name: str) -> dict[str, Any]:
    path = Path(__file__).parent / "tables" / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


@cache
def class_table(name: str) -> ClassTable:
    """One of the package's class lists, for example ``"voc2012"``."""
    classes = _table(name)["classes"]
    return ClassTable(
        names=tuple(entry["name"] for entry in classes),
        values=tuple(entry["value"] for entry in classes),
        seen=tuple(index for index, entry in enumerate(classes) if entry["seen"]),
        map_values=tuple(e["map_value"] for e in classes) if "map_value" in classes[0] else None,
    )


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """A published data set, and what becomes of the classes in its table."""

    table: str
    classes: Remake | None = None  # its own classes; None: all
    zegformer: Remake | None = None  # ZegFormer's convention; None: there is one only
    has_background: bool = False  # whether the first is background, a class only on request
    rest: bool = False  # whether what is of no class, or not annotated, is the first class

    @property
    def layout(self) -> Layout:
        """How its files lie."""
        return schema.decode(Layout, _table(self.table)["layout"], self.table, DatasetError)

    @property
    def lacks(self) -> tuple[str, ...]:
        """The options of :func:`open_published` that it does not have."""
        has = {"background": self.has_background, "convention": self.zegformer is not None}
        return tuple(name for name, there in has.items() if not there)


def published_classes(
    name: str, *, background: bool = False, convention: Literal["zegclip", "zegformer"] = "zegclip"
) -> ClassTable:
    """The classes of a published data set, and which of them its split shows in training."""
    check_choice("name", name, PUBLISHED)
    row = PUBLISHED[name]
    table = class_table(row.table)
    if row.classes is not None:
        table = row.classes(table)
    if row.has_background and not background:
        table = table.pick(range(1, len(table.names)))
    if row.zegformer is not None and convention == "zegformer":
        table = row.zegformer(table)
    return table


def open_published(
    name: str,
    root: str | Path,
    split: str = "train",
    *,
    background: bool = False,
    unseen: Sequence[str] | None = None,
    convention: Literal["zegclip", "zegformer"] = "zegclip",
    partial: bool = False,
) -> FileDataset:
    """Open a published data set."""
    row = PUBLISHED[name]
    layout = row.layout
    check_choice("split", split, layout.splits)
    check_choice("convention", convention, ("zegclip", "zegformer"))
    folder = layout.find(root, first=Path(layout.splits[split][0][0]).parts[0])
    pairs = layout.pairs(folder, split, partial)
    listed = class_table(row.table)
    table = published_classes(name, background=background, convention=convention)
    table = table.with_unseen(unseen)
    converted = layout.mask_suffixes[0]  # if there are others, those have the values as published
    as_published = not pairs[0].mask.name.lower().endswith(converted.lower())
    values, others = ((as_published and kind.map_values) or kind.values for kind in (table, listed))
    ignored = [value for value in layout.ignored if value not in values]
    title = f"context{len(table.names)}" if row.has_background else name
    indices = {value: index for index, value in enumerate(values)}
    if row.rest:  # the first class has the others' values, and none of its own
        indices = dict.fromkeys((*others, *ignored), 0)
        indices |= {value: index for index, value in enumerate(values) if index}
    labels_of = LabelTable(indices, len(table.names), ignored)
    return FileDataset(f"{title}/{split}", table, pairs, labels_of)


def _seen_first(table: ClassTable) -> ClassTable:
    return table.pick(table.seen + table.unseen)


def _potted_plant(table: ClassTable) -> ClassTable:
    names = (name.replace("pottedplant", "potted plant") for name in table.names)
    return replace(table, names=tuple(names))


def _all_seen(table: ClassTable) -> ClassTable:
    return replace(table, seen=tuple(range(len(table.names))))


def _without_background(table: ClassTable) -> ClassTable:
    return _all_seen(table.pick(range(1, len(table.names))))


def _with_background(table: ClassTable) -> ClassTable:
    """One more class, the first."""
    more = replace(
        table,
        names=("background", *table.names),
        values=(0, *table.values),
        map_values=table.map_values and (0, *table.map_values),
    )
    return _all_seen(more)


def _objects(table: ClassTable) -> ClassTable:
    """COCO's 80 things, and background."""
    return _with_background(table.pick(range(80)))


def _variant(table: str, classes: Remake = _all_seen, *, rest: bool = False) -> PublishedSet:
    """The same files with the classes that papers on dense CLIP label; all count as seen."""
    return PublishedSet(table=table, classes=classes, rest=rest)


PUBLISHED: dict[str, PublishedSet] = {
    "ade20k": PublishedSet(table="ade20k"),
    "ade20k_full": PublishedSet(table="ade20k_full"),
    "camvid": PublishedSet(table="camvid"),
    "cityscapes": PublishedSet(table="cityscapes"),
    "cocostuff164k": PublishedSet(table="cocostuff164k", zegformer=_seen_first),
    "context": PublishedSet(table="pascal_context", has_background=True),
    "voc2012": PublishedSet(table="voc2012", zegformer=_potted_plant),
    "coco-object": _variant("cocostuff164k", _objects, rest=True),
    "coco-stuff": _variant("cocostuff164k"),
    "context59": _variant("pascal_context", _without_background),
    "context60": _variant("pascal_context"),
    "voc20": _variant("voc2012"),
    "voc21": _variant("voc2012", _with_background),
}
"""By the name that :func:`zsseg_rt.evaluation.create_dataset` takes."""
