"""Class lists of the known data sets: names, mask values, colours, and which are seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.errors import DatasetError

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set, in the order of its labels.

    Attributes:
        names: One phrase per class; commas separate synonyms.
        values: Value of each class in the masks that training and evaluation read.
        seen: Indices of the seen classes, ascending.
        source: Where the list and the split come from.
        map_values: Value of each class in the masks as published, where those differ.
        colours: Customary colour of each class, RGB, if there are any.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    seen: tuple[int, ...]
    source: str = ""
    map_values: tuple[int, ...] | None = None
    colours: tuple[Colour, ...] | None = None

    @property
    def unseen(self) -> tuple[int, ...]:
        """Indices of the unseen classes, ascending."""
        seen = set(self.seen)
        return tuple(index for index in range(len(self.names)) if index not in seen)

    @property
    def palette(self) -> NDArray[np.uint8] | None:
        """The colours, uint8 ``[C, 3]``."""
        return None if self.colours is None else np.asarray(self.colours, np.uint8)

    def pick(self, indices: Sequence[int]) -> ClassTable:
        """The same classes in another order, or some of them."""
        seen = set(self.seen)
        return replace(
            self,
            names=tuple(self.names[index] for index in indices),
            values=tuple(self.values[index] for index in indices),
            seen=tuple(place for place, index in enumerate(indices) if index in seen),
            map_values=self.map_values and tuple(self.map_values[index] for index in indices),
            colours=self.colours and tuple(self.colours[index] for index in indices),
        )

    def with_unseen(self, unseen: Sequence[str] | None) -> ClassTable:
        """The same classes, split differently."""
        if unseen is None:
            return self
        places = {name: index for index, name in enumerate(self.names)}
        for index, name in enumerate(self.names):
            for synonym in name.split(","):
                places.setdefault(synonym.strip(), index)
        missing = [name for name in unseen if name not in places]
        if missing:
            raise DatasetError(
                f"unseen: expected classes of this data set, got {_listed(missing)}. "
                f"It has {_listed(self.names, 20)}."
            )
        left_out = {places[name] for name in unseen}
        if len(left_out) == len(self.names):
            raise DatasetError("unseen: expected at least one class to stay seen, got all of them.")
        seen = tuple(index for index in range(len(self.names)) if index not in left_out)
        return replace(self, seen=seen, source=f"{self.source} Split given by the user.")


@cache
def class_table(name: str) -> ClassTable:
    """Read one of the package's class lists, for example ``"voc2012"``."""
    folder = files("zsseg_rt.evaluation.datasets").joinpath("tables")
    raw = json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    classes = raw["classes"]
    return ClassTable(
        names=tuple(entry["name"] for entry in classes),
        values=tuple(entry["value"] for entry in classes),
        seen=tuple(index for index, entry in enumerate(classes) if entry["seen"]),
        source=raw["source"],
        map_values=_column(classes, "map_value"),
        colours=_column(classes, "colour"),
    )


def _column(classes: Sequence[dict[str, Any]], key: str) -> tuple[Any, ...] | None:
    if key not in classes[0]:
        return None
    return tuple(tuple(v) if isinstance(v := entry[key], list) else v for entry in classes)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
