"""Class names and a legend on an image, readable when it is shown at a phone's width."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv

Image = npt.NDArray[np.uint8]
NamePlace = tuple[str, int, int]
"""A name, and the column and row of the image that it is around."""

_PHONE = 400  # pixels across, on which an image is shown
_LEAST_HEIGHT = 11  # of capitals there, in pixels
_CAPITALS = 21.0  # height of the font's capitals at scale 1
_SMALLEST_SHARE = 0.01  # of the image; parts below get no name
_MOST_NAMES = 40
_OUTLINED = ((0, 0, 0), (255, 255, 255))  # black around white letters
_STAYS = 0.6  # of a part's greatest depth: a name moves where it has less around it


class LegendEntry(NamedTuple):
    """A line of the legend."""

    name: str  # The class
    share: float  # Its part of the image, in [0, 1]
    colour: tuple[int, int, int]  # In the image's channel order


def enlarged(image: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    """A copy whose pixels are that many times as high and wide."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def enlargement(width: int) -> int:
    """The whole factor that makes an image at least as wide as a phone."""
    return max(-(-_PHONE // width), 1)


def draw_names(
    image: Image,
    parts: Sequence[tuple[str, npt.NDArray[np.bool_], Any]],
    *,
    step: int = 1,
    before: Sequence[NamePlace] = (),
) -> list[NamePlace]:
    """Write each part's name inside it, where it is widest; a name that does not fit is left out.

    Parts are name, mask and the mask's left upper corner, larger ones first; masks and corners are
    of every ``step``-th row and column of the image, uint8 [H, W, 3], which is drawn on. A name
    that still fits where it was, as the call for the last frame returned, stays there.
    """
    cv2 = import_opencv("to draw names")
    height, width = image.shape[:2]
    boxes: list[tuple[int, int, int, int]] = []
    drawn: list[NamePlace] = []
    for name, mask, corner in parts[:_MOST_NAMES]:
        if mask.sum() * step * step < _SMALLEST_SHARE * height * width:
            continue
        near = [place for place in before if place[0] == name]
        x, y = _inside(cv2, mask, corner, step, near)
        text = _Text(cv2, name, width)
        right = min(max(x - text.width // 2, 2), width - text.width - 2)
        down = min(max(y + text.height // 2, text.height + 2), height - 2)
        box = right, down - text.height, right + text.width, down
        if right < 2 or any(_overlap(box, other) for other in boxes):
            continue
        boxes.append(box)
        drawn.append((name, x, y))
        text.draw(image, right, down, _OUTLINED)
    return drawn


def _inside(
    cv2: Any,
    mask: npt.NDArray[np.bool_],
    corner: tuple[int, int],
    step: int,
    near: Sequence[NamePlace],
) -> tuple[int, int]:
    """Column and row of the image where a mask is widest, or those of before if they will do."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(np.argmax(depth)), depth.shape)
    left, top = corner[0] - 1, corner[1] - 1
    for _, old_x, old_y in near:
        row, column = old_y // step - top, old_x // step - left
        if not (0 <= row < depth.shape[0] and 0 <= column < depth.shape[1]):
            continue
        if depth[row, column] >= _STAYS * depth[y, x]:
            return old_x, old_y
    return (int(x) + left) * step, (int(y) + top) * step


def legend_strip(width: int, entries: Sequence[LegendEntry], *, lines: int | None = None) -> Image:
    """A white strip uint8 [H, width, 3] with colour, name and share of each class."""
    cv2 = import_opencv("to draw a legend")
    shares = ["<1%" if entry.share < 0.01 else f"{entry.share:.0%}" for entry in entries]
    pairs = zip(entries, shares, strict=True)
    texts = [_Text(cv2, f"{entry.name} {share}", width) for entry, share in pairs]
    gap = _capitals(width)
    row = round(gap * 1.9)
    places, x, line = [], gap // 2, 0
    for text in texts:
        needed = row + text.width + gap
        if x > gap and x + needed > width:
            x, line = gap // 2, line + 1
        if lines is not None and line >= lines:
            break
        places.append((x, line))
        x += needed
    height = (lines or line + 1) * row + gap // 2
    strip = np.full((height, width, 3), 255, np.uint8)
    for text, entry, (x, line) in zip(texts, entries, places, strict=False):
        top = line * row + gap // 2
        corner = x + text.capitals, top + text.capitals
        cv2.rectangle(strip, (x, top), corner, entry.colour, -1)
        cv2.rectangle(strip, (x, top), corner, (90, 90, 90), 1)
        text.draw(strip, x + row, top + text.capitals, [(0, 0, 0)])
    return strip


class _Text:
    """A line of text that can be read when the image is a phone wide; cut to the image's width."""

    def __init__(self, cv2: Any, text: str, image_width: int) -> None:
        self._cv2 = cv2
        self.capitals = _capitals(image_width)
        self._scale = self.capitals / _CAPITALS
        self._weight = max(1, round(self.capitals / 11))
        self.text = _ascii(text)
        while self._measure() > image_width - 4 * self.capitals and len(self.text) > 4:
            self.text = self.text[:-4] + "..."
        self.width, self.height = self._measure(), self.capitals

    def _measure(self) -> int:
        font = self._cv2.FONT_HERSHEY_SIMPLEX
        (width, _), _ = self._cv2.getTextSize(self.text, font, self._scale, self._weight)
        return int(width)

    def draw(
        self, image: Image, left: int, bottom: int, colours: Sequence[tuple[int, int, int]]
    ) -> None:
        """Write in the last colour; the one before it, if any, is the letters' outline."""
        from zsseg_rt import ops

        # A heavier outline of the letters themselves would be wider: fonts differ with the version.
        cv2, margin = self._cv2, 2 * self.capitals
        weights = np.zeros((len(colours), 3 * margin, self.width + 2 * margin), np.uint8)
        cv2.putText(
            weights[-1], self.text, (margin, 2 * margin), cv2.FONT_HERSHEY_SIMPLEX, self._scale,
            255, self._weight, cv2.LINE_AA,
        )  # fmt: skip
        if len(colours) > 1:
            cv2.dilate(weights[-1], np.ones((2 * self._weight + 1,) * 2, np.uint8), weights[0])
        x, y, width, height = cv2.boundingRect(weights[0])
        cut = np.ascontiguousarray(weights[:, y : y + height, x : x + width])
        place = bottom - 2 * margin + y, left - margin + x
        ops.ink(image, cut, place, colours)


def _ascii(text: str) -> str:
    """The text in the font's letters: accents are dropped, other letters become "?"."""
    plain = unicodedata.normalize("NFKD", text)
    letters = (c for c in plain if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in letters)


def _capitals(image_width: int) -> int:
    """Pixels that a capital is high, in an image of that width."""
    return max(_LEAST_HEIGHT, round(image_width * _LEAST_HEIGHT / _PHONE))


def _overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))
