"""The world written as a folder data set, which training and evaluation read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tools.scenes.dataset import SceneDataset
from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import ArgumentError
from zsseg_rt.text.name_lists import UNSEEN_MARK

LENGTHS = {"train": 2400, "train_seen": 2400, "val": 300, "demo": 16}
"""Scenes of each split, unless their number is given."""

_FAST = (cv2.IMWRITE_PNG_COMPRESSION, 1)


def write_folder(
    root: str | Path, splits: Mapping[str, int | None] | None = None, **options: Any
) -> Path:
    """Write scenes as ``images/SPLIT``, ``masks/SPLIT`` and ``classes.txt``.

    Args:
        root: The data set's folder; a split that it has already is not written over.
        splits: The splits and their lengths; None for one of :data:`LENGTHS`. Without any, those
            of ``train`` and ``val``.
        **options: Of :class:`SceneDataset`.

    Returns:
        ``root``, to be opened as ``create_dataset("folder", root, SPLIT)``.

    Raises:
        ArgumentError: An option is out of range, the split is there already, or the folder has
            other classes.
    """
    root = Path(root)
    for split, length in (splits or {"train": None, "val": None}).items():
        count = LENGTHS.get(split) if length is None else length
        _write_split(root, split, SceneDataset(split, length=count, **options))  # type: ignore[arg-type]
    return root


def _write_split(root: Path, split: str, scenes: SceneDataset) -> None:
    names, places = root / "classes.txt", [root / kind / split for kind in ("images", "masks")]
    listed = _class_list(scenes)
    if names.exists() and names.read_bytes() != listed:
        raise ArgumentError(
            f"{names}: expected the scenes' {len(scenes.class_names)} classes, got others. Choose "
            "another folder."
        )
    for place in places:
        if place.exists() and any(place.iterdir()):
            raise ArgumentError(
                f"{place}: expected no images yet, got some. Remove the folder, or choose another."
            )
        place.mkdir(parents=True, exist_ok=True)
    write_whole(names, listed)
    for number in range(len(scenes)):
        sample = scenes[number]
        for place, pixels in zip(places, (sample.image[..., ::-1], sample.labels), strict=True):
            encoded = cv2.imencode(".png", np.ascontiguousarray(pixels), _FAST)[1]
            (place / f"{number:06d}.png").write_bytes(encoded.tobytes())


def _class_list(scenes: SceneDataset) -> bytes:
    seen = set(scenes.seen)
    marks = (
        name if index in seen else f"{name} {UNSEEN_MARK}"
        for index, name in enumerate(scenes.class_names)
    )
    return "".join(f"{line}\n" for line in marks).encode()


def as_folder(tables: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """A training configuration on ``"scenes"`` as one on a folder, which is written if need be.

    Args:
        tables: Of a :class:`zsseg_rt.training.config.TrainConfig`; ``data.name = "scenes"`` takes
            the options of :class:`SceneDataset`, as ``evaluation.options`` does.
        place: Gets a folder for each world, named by its options.

    Returns:
        The tables that read it; as given if they name another data set.
    """
    data, judged = dict(tables["data"]), dict(tables.get("evaluation", {}))
    if data["name"] != "scenes":
        return dict(tables)
    options = data.pop("options", {})
    limits = judged.pop("options", None)
    wanted = [(data.get("split", "train"), options)]
    if judged.get("split", "val"):
        wanted.append((judged.get("split", "val"), options if limits is None else limits))
    worlds = [{k: v for k, v in of.items() if k != "length"} for _, of in wanted]
    root = place / _name_of(worlds, [of.get("length") for _, of in wanted])
    for (split, of), world in zip(wanted, worlds, strict=True):
        if not (root / "masks" / split).exists():
            write_folder(root, {split: of.get("length")}, **world)
    data |= {"name": "folder", "root": str(root)}
    return {**tables, "data": data, "evaluation": judged}


def _name_of(worlds: list[dict[str, Any]], lengths: list[int | None]) -> str:
    text = json.dumps([worlds, lengths], sort_keys=True)
    kept = "".join(letter if letter.isalnum() else "-" for letter in text)
    return "-".join(part for part in kept.split("-") if part)
