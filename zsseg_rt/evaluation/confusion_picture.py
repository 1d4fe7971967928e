"""A confusion matrix as an image: one row per true class, shares of the row in colour."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv
from zsseg_rt.errors import ShapeError, SourceError
from zsseg_rt.results.visualize import save_file

Picture = npt.NDArray[np.uint8]

_INK, _PAPER, _UNSEEN, _GRID = (30, 30, 30), 255, (190, 60, 20), (225, 225, 225)
_DARKEST = np.array([8, 48, 107])  # RGB of a share of 1
_LONGEST_NAME = 28
_CELLS_WITH_NUMBERS = 45  # from this many classes on, cells are too small for numbers


def write_confusion_png(
    path: str | Path,
    counts: npt.NDArray[np.int64],
    class_names: Sequence[str],
    *,
    seen: Collection[int] = (),
) -> None:
    """Draw a confusion matrix and write it as PNG; see :func:`draw_confusion`."""
    picture = draw_confusion(counts, class_names, seen=seen)
    cv2 = import_opencv("to draw")
    ok, encoded = cv2.imencode(".png", picture[:, :, ::-1])
    if not ok:
        raise SourceError(f"{path}: the image cannot be encoded as PNG. Check its size.")
    save_file(path, encoded.tobytes())


def draw_confusion(
    counts: npt.NDArray[np.int64],
    class_names: Sequence[str],
    *,
    seen: Collection[int] = (),
) -> Picture:
    """Draw a confusion matrix, each row divided by its sum.

    Shapes:
        counts: int64 ``[C, C + 1]``, rows truth, columns prediction, last column no class; see
            :class:`zsseg_rt.evaluation.metrics.ConfusionMatrix`.

    Returns:
        RGB, uint8 ``[H, W, 3]``.
    """
    if counts.shape != (len(class_names), len(class_names) + 1):
        raise ShapeError(
            f"counts: expected [C, C + 1] for {len(class_names)} names, got {counts.shape}."
        )
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    columns = [*class_names, "(no class)"] if counts[:, -1].any() else list(class_names)
    layout = _Layout(class_names, columns)
    picture = layout.blank()
    _draw_cells(picture, layout, shares[:, : len(columns)], totals[:, 0] > 0)
    colours = [_INK if not seen or index in seen else _UNSEEN for index in range(len(columns))]
    colours[len(class_names) :] = [_INK] * (len(columns) - len(class_names))
    _draw_names(picture, layout, class_names, columns, colours)
    title = "rows: truth, columns: prediction, % of the row"
    _put_text(picture, title, (layout.margin, layout.margin + 10), _INK, 0.45)
    if seen and len(seen) < len(class_names):
        note = "unseen classes"
        _put_text(picture, note, (layout.margin, layout.margin + 28), _UNSEEN, 0.45)
    return picture


class _Layout:
    """Where things are, in pixels."""

    margin = 12

    def __init__(self, rows: Sequence[str], columns: Sequence[str]) -> None:
        self.rows, self.columns = len(rows), len(columns)
        self.numbers = len(rows) < _CELLS_WITH_NUMBERS
        self.cell = 36 if self.numbers else 14
        self.font = 0.45 if self.numbers else 0.32
        widest = max(_text_width(_short(name), self.font) for name in [*rows, *columns])
        self.left = self.margin + widest + 8
        self.top = self.margin + widest + 8 + 40

    def blank(self) -> Picture:
        height = self.top + self.rows * self.cell + self.margin
        width = max(self.left + self.columns * self.cell + self.margin, 380)
        return np.full((height, width, 3), _PAPER, np.uint8)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Top and left of a cell."""
        return self.top + row * self.cell, self.left + column * self.cell


def _draw_cells(
    picture: Picture,
    layout: _Layout,
    shares: npt.NDArray[np.float64],
    counted: npt.NDArray[np.bool_],
) -> None:
    for row, column in np.ndindex(*shares.shape):
        top, left = layout.corner(row, column)
        share = float(shares[row, column])
        cell = picture[top : top + layout.cell, left : left + layout.cell]
        cell[:] = _GRID
        # The square root keeps small confusions visible.
        inside = 255 + (_DARKEST - 255) * share**0.5 if counted[row] else np.array(_GRID)
        cell[1:, 1:] = np.rint(inside)
        if layout.numbers and share >= 0.005:
            text = f"{100 * share:.0f}"
            place = (
                left + (layout.cell - _text_width(text, 0.4)) // 2,
                top + layout.cell // 2 + 5,
            )
            _put_text(picture, text, place, (255, 255, 255) if share > 0.3 else _INK, 0.4)


def _draw_names(
    picture: Picture,
    layout: _Layout,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> None:
    middle = layout.cell // 2 + 4
    for row, name in enumerate(rows):
        top, _ = layout.corner(row, 0)
        text = _short(name)
        left = layout.left - 6 - _text_width(text, layout.font)
        _put_text(picture, text, (left, top + middle), colours[row], layout.font)
    for column, name in enumerate(columns):
        _, left = layout.corner(0, column)
        upright = _text_strip(_short(name), colours[column], layout.font)
        turned = np.rot90(upright)
        bottom, start = layout.top - 6, left + (layout.cell - turned.shape[1]) // 2
        region = picture[bottom - turned.shape[0] : bottom, start : start + turned.shape[1]]
        np.minimum(region, turned, out=region)


def _text_strip(text: str, colour: tuple[int, int, int], font: float) -> Picture:
    strip = np.full((16, _text_width(text, font) + 2, 3), _PAPER, np.uint8)
    _put_text(strip, text, (1, 12), colour, font)
    return strip


def _put_text(
    picture: Picture, text: str, place: tuple[int, int], colour: tuple[int, int, int], font: float
) -> None:
    cv2 = import_opencv("to draw")
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, font, colour, 1, cv2.LINE_AA)


def _text_width(text: str, font: float) -> int:
    cv2 = import_opencv("to draw")
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, font, 1)
    return int(width)


def _short(name: str) -> str:
    """Printable ASCII, all that OpenCV's font has, and not too long."""
    plain = name.encode("ascii", "replace").decode()
    return plain if len(plain) <= _LONGEST_NAME else plain[: _LONGEST_NAME - 3] + "..."
