"""Turn labelme's polygons into a data set to train on; see docs/training.md.

``python tools/labelme_masks.py POLYGONS OUT`` reads ``POLYGONS/*.json`` and the photos that they
name, and writes ``images``, ``masks``, ``classes.txt``, ``train.txt`` and ``val.txt`` into ``OUT``.
"""

import sys
from pathlib import Path

# Beside this file is profile.py, which must not be taken for Python's own module of that name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import shutil
from dataclasses import dataclass

import cv2
import numpy as np

from zsseg_rt.common.files import write_atomically
from zsseg_rt.errors import DatasetError, ZssegError
from zsseg_rt.photos import read_photo

NOT_ANNOTATED = 255
BACKGROUND = ("_background_", "__ignore__")  # labelme's own names for what is no class
POINTS = {"polygon": 3, "rectangle": 2, "circle": 2}  # of each kind of shape, at least


@dataclass(frozen=True)
class Annotated:
    """A photo with its polygons.

    Attributes:
        photo: The file.
        size_hw: As the labelme file states it.
        shapes: Label, kind and points [N, 2] of each, in the order in which they are drawn.
    """

    photo: Path
    size_hw: tuple[int, int]
    shapes: list[tuple[str, str, np.ndarray]]


def main() -> None:
    """Read the command line, then every labelme file, then write the data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("polygons", type=Path, help="folder of labelme's .json files")
    parser.add_argument("out", type=Path, help="new or empty folder for the data set")
    parser.add_argument("--rest", default="", metavar="NAME", help="class of all that lies outside")
    parser.add_argument("--classes", default="", help='"a, b": their order; default: alphabetical')
    parser.add_argument("--val", type=float, default=0.25, help="share for val.txt: the last files")
    arguments = parser.parse_args()
    try:
        print(convert(**vars(arguments)))
    except (ZssegError, OSError) as error:
        sys.exit(f"labelme_masks: {error}")


def convert(polygons: Path, out: Path, *, rest: str, classes: str, val: float) -> str:
    """Write the data set and return a sentence on it."""
    if not 0 < val < 1:
        raise DatasetError(f"--val: expected a share between 0 and 1, got {val}")
    if out.exists() and any(out.iterdir()):
        raise DatasetError(f"{out}: expected a new or empty folder. Name another one.")
    files = sorted(polygons.glob("*.json"))
    if len(files) < 2:
        raise DatasetError(f"{polygons}: expected two .json files or more, found {len(files)}")
    photos = [read_labelme(file) for file in files]
    names = class_names(photos, rest, [name.strip() for name in classes.split(",") if name.strip()])
    stems = [photo.photo.stem for photo in photos]
    if len(set(stems)) < len(stems):
        raise DatasetError(f"{polygons}: expected photos with different names")
    for part in ("images", "masks"):
        (out / part).mkdir(parents=True)
    for photo in photos:
        mask = draw(photo, names, rest)
        shutil.copy(photo.photo, out / "images" / photo.photo.name)
        data = cv2.imencode(".png", mask)[1].tobytes()
        write_atomically(out / "masks" / f"{photo.photo.stem}.png", data)
    first_val = min(len(stems) - 1, max(1, round(len(stems) * (1 - val))))
    lists = {"classes": names, "train": stems[:first_val], "val": stems[first_val:]}
    for name, lines in lists.items():
        (out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (
        f"{out}: {first_val} photos to train, {len(stems) - first_val} to check; {', '.join(names)}"
    )


def read_labelme(path: Path) -> Annotated:
    """Read a labelme file.

    Raises:
        DatasetError: It is no labelme file, or has shapes without an area.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        photo = path.parent / content["imagePath"].replace("\\", "/")
        size_hw = int(content["imageHeight"]), int(content["imageWidth"])
        shapes = [
            (str(s["label"]), s.get("shape_type") or "polygon", np.array(s["points"], np.float64))
            for s in content["shapes"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: expected a file of labelme, got {error!r}") from error
    if not photo.is_file():
        raise DatasetError(f"{path}: expected its photo at {photo}. Move the photo there.")
    for label, kind, points in shapes:
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < POINTS.get(kind, 1 << 30):
            raise DatasetError(
                f"{path}: expected polygons, got a {kind} named {label!r}. Redraw it."
            )
    return Annotated(photo, size_hw, shapes)


def class_names(photos: list[Annotated], rest: str, wanted: list[str]) -> list[str]:
    """The classes in their order.

    Raises:
        DatasetError: A label is not among the classes that were wanted.
    """
    drawn = {label for photo in photos for label, _, _ in photo.shapes} - set(BACKGROUND)
    names = wanted or sorted(drawn - {rest})
    names += [rest] if rest and rest not in names else []
    if missing := sorted(drawn - set(names)):
        raise DatasetError(f"--classes: expected every label, {missing[0]!r} is missing. Add it.")
    if len(names) > NOT_ANNOTATED:
        raise DatasetError(f"classes: expected at most {NOT_ANNOTATED}, got {len(names)}")
    return names


def draw(photo: Annotated, names: list[str], rest: str) -> np.ndarray:
    """The mask of a photo, uint8 [H, W]: shapes in order, so that later ones cover earlier ones.

    Raises:
        DatasetError: The photo has another size than its labelme file states.
    """
    found = read_photo(photo.photo).shape[:2]
    if found != photo.size_hw:
        raise DatasetError(f"{photo.photo}: expected {photo.size_hw} pixels (h, w), got {found}")
    outside = names.index(rest) if rest else NOT_ANNOTATED
    mask = np.full(photo.size_hw, outside, np.uint8)
    for label, kind, points in photo.shapes:
        value = outside if label in BACKGROUND else names.index(label)
        mask[_inside(kind, points, photo.size_hw)] = value
    return mask


def _inside(kind: str, points: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Whether each pixel's centre lies in a shape; the first pixel covers (0, 0) to (1, 1)."""
    height, width = size_hw
    found = np.zeros(size_hw, bool)
    if kind == "circle":
        (x, y), edge = points[0], points[1]
        rows, columns = np.mgrid[:height, :width] + 0.5
        return (columns - x) ** 2 + (rows - y) ** 2 < ((edge - points[0]) ** 2).sum()
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    starts, ends = points, np.roll(points, -1, axis=0)
    for row in range(height):
        y = row + 0.5
        crossed = (starts[:, 1] <= y) != (ends[:, 1] <= y)
        (x0, y0), (x1, y1) = starts[crossed].T, ends[crossed].T
        edges = np.sort(x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        columns = np.clip(np.ceil(edges - 0.5), 0, width).astype(int)
        for first, last in zip(columns[::2], columns[1::2], strict=True):
            found[row, first:last] = True
    return found


if __name__ == "__main__":
    main()
