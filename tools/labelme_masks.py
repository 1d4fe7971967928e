"""Turn labelme's polygons and masks into a data set to train on; see docs/training.md.

``python tools/labelme_masks.py POLYGONS OUT`` reads ``POLYGONS/*.json`` and the photos that they
name or hold, and writes ``images``, ``masks``, ``classes.txt``, ``train.txt`` and ``val.txt`` into
``OUT``.
"""

import sys
from pathlib import Path

# Beside this file is profile.py, which must not be taken for Python's own module of that name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import base64
import json
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import PureWindowsPath

import cv2
import numpy as np

from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import DatasetError, ZssegError
from zsseg_rt.photos import decode_photo

NOT_ANNOTATED = 255
BACKGROUND = ("_background_", "__ignore__")  # labelme's own names for what is no class
# Points of each kind of shape that has an area, at least. Other programs write the last two.
POINTS = {
    "polygon": 3, "rectangle": 2, "circle": 2, "mask": 2, "oriented_rectangle": 3,
    "rotated_rectangle": 3, "rotation": 3,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Shape:
    """A drawn shape: its label, kind and points [N, 2], and a mask's pixels, bool [h, w]."""

    label: str
    kind: str
    points: np.ndarray
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class Annotated:
    """A photo with its shapes.

    Attributes:
        photo: What its file is called.
        content: The file's bytes.
        size_hw: As the labelme file states it; None if it does not.
        shapes: In the order in which they are drawn.
        skipped: Kinds of the shapes without an area.
    """

    photo: Path
    content: bytes
    size_hw: tuple[int, int] | None
    shapes: list[Shape]
    skipped: list[str]


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
    wanted = [name.strip() for name in classes.split(",") if name.strip()]
    remarks = [*unify_labels(photos, [*wanted, rest]), *count_skipped(photos)]
    names = class_names(photos, rest, wanted)
    stems = [photo.photo.stem for photo in photos]
    if len(set(stems)) < len(stems):
        raise DatasetError(f"{polygons}: expected photos with different names")
    # All before anything is written
    masks = [cv2.imencode(".png", draw(photo, names, rest))[1].tobytes() for photo in photos]
    for part in ("images", "masks"):
        (out / part).mkdir(parents=True)
    for photo, mask in zip(photos, masks, strict=True):
        write_whole(out / "images" / photo.photo.name, photo.content)
        write_whole(out / "masks" / f"{photo.photo.stem}.png", mask)
    first_val = min(len(stems) - 1, max(1, round(len(stems) * (1 - val))))
    lists = {"classes": names, "train": stems[:first_val], "val": stems[first_val:]}
    for name, lines in lists.items():
        (out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = f"{first_val} photos to train, {len(stems) - first_val} to check"
    return "\n".join([*remarks, f"{out}: {counts}; {', '.join(names)}"])


def read_labelme(path: Path) -> Annotated:
    """Read a labelme file, and the photo that it names, or holds.

    Raises:
        DatasetError: It is no labelme file, or its photo is nowhere.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        photo, data = find_photo(path, content)
        sides = content.get("imageHeight"), content.get("imageWidth")
        drawn = [read_shape(shape) for shape in content["shapes"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: expected a file of labelme, got {error!r}") from error
    size_hw = (int(sides[0]), int(sides[1])) if all(sides) else None
    shapes = [shape for shape in drawn if len(shape.points) >= POINTS.get(shape.kind, 1 << 30)]
    skipped = [shape.kind for shape in drawn if shape not in shapes]
    return Annotated(photo, data, size_hw, shapes, skipped)


def read_shape(shape: dict) -> Shape:
    """A shape of a labelme file; masks are PNG files of a box whose corners are the points."""
    kind = shape.get("shape_type") or "polygon"
    points = np.array(shape["points"] or np.zeros((0, 2)), np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points of {shape['label']!r} that are no pairs")
    pixels = None
    if kind == "mask":
        data = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
        pixels = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        if pixels is None:
            raise ValueError(f"a mask named {shape['label']!r} that is no PNG")
        pixels = pixels > 0
    return Shape(str(shape["label"]), kind, points, pixels)


def find_photo(path: Path, content: dict) -> tuple[Path, bytes]:
    """The photo at the path that a labelme file names, beside that file, or inside it.

    Names are compared as people read them: in any case, composed or not.
    """
    named = content["imagePath"].replace("\\", "/")
    name = PureWindowsPath(named).name
    wanted = _as_read(name)
    beside = [p for p in sorted(path.parent.iterdir()) if _as_read(p.name) == wanted]
    for photo in (path.parent / named, *beside):
        if photo.is_file():
            return photo, photo.read_bytes()
    if not content.get("imageData"):
        raise DatasetError(
            f"{path}: expected its photo at {path.parent / named}, as {path.parent / name} or as "
            "imageData in the file. Move the photo there."
        )
    data = base64.b64decode(content["imageData"])
    is_png = data[:8] == b"\x89PNG\r\n\x1a\n"
    return Path(name).with_suffix(".png" if is_png else Path(name).suffix or ".jpg"), data


def _as_read(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def unify_labels(photos: list[Annotated], names: list[str]) -> list[str]:
    """Spell labels that differ in case or spaces alike, as known or commonest; say which did."""
    counts = Counter(shape.label for photo in photos for shape in photo.shapes)
    spellings: dict[str, str] = {}
    for label in [*filter(None, names), *(label for label, _ in counts.most_common())]:
        spellings.setdefault(_as_read(" ".join(label.split())), " ".join(label.split()))
    spelling = {label: spellings[_as_read(" ".join(label.split()))] for label in counts}
    for photo in photos:
        photo.shapes[:] = [replace(shape, label=spelling[shape.label]) for shape in photo.shapes]
    return [
        f"{label!r}: taken for {name!r}, which differs in case or spaces alone"
        for label, name in sorted(spelling.items())
        if label != name
    ]


def count_skipped(photos: list[Annotated]) -> list[str]:
    """A line on the shapes without an area."""
    kinds = Counter(kind for photo in photos for kind in photo.skipped)
    listed = ", ".join(f"{count} of kind {kind}" for kind, count in sorted(kinds.items()))
    return [f"skipped, because they have no area: {listed}"] if kinds else []


def class_names(photos: list[Annotated], rest: str, wanted: list[str]) -> list[str]:
    """The classes in their order.

    Raises:
        DatasetError: A label is not among the classes that were wanted.
    """
    drawn = {shape.label for photo in photos for shape in photo.shapes} - set(BACKGROUND)
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
    size_hw = decode_photo(photo.content, photo.photo).shape[:2]
    if photo.size_hw not in (None, size_hw):
        raise DatasetError(f"{photo.photo}: expected {photo.size_hw} pixels (h, w), got {size_hw}")
    outside = names.index(rest) if rest else NOT_ANNOTATED
    mask = np.full(size_hw, outside, np.uint8)
    for shape in photo.shapes:
        value = outside if shape.label in BACKGROUND else names.index(shape.label)
        mask[_inside(shape, size_hw)] = value
    return mask


def _inside(shape: Shape, size_hw: tuple[int, int]) -> np.ndarray:
    """Whether each pixel's centre lies in a shape; the first pixel covers (0, 0) to (1, 1)."""
    kind, points = shape.kind, shape.points
    height, width = size_hw
    mask = np.zeros(size_hw, bool)
    if shape.pixels is not None:
        left, top = (round(value) for value in points.min(axis=0))
        rows, columns = np.nonzero(shape.pixels)
        rows, columns = rows + top, columns + left
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        mask[rows[inside], columns[inside]] = True
        return mask
    if kind == "circle":
        (x, y), edge = points[0], points[1]
        rows, columns = np.mgrid[:height, :width] + 0.5
        return (columns - x) ** 2 + (rows - y) ** 2 < ((edge - points[0]) ** 2).sum()
    if kind == "rectangle" and len(points) == 2:
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
            mask[row, first:last] = True
    return mask


if __name__ == "__main__":
    main()
