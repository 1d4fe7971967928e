"""Drawings of bars, points and lines on axes, as SVG elements; needs no package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, LEFT, RIGHT = 806, 190, 16  # pixels: the drawing, and its margins
TOP, BOTTOM = 34, 40
_LETTER = 7.2  # pixels that a letter is wide, about

Scale = Callable[[float], float]


class Drawing:
    """An SVG element that is put together piece by piece."""

    def __init__(self, title: str, height: float) -> None:
        self.height = height
        self._title = title
        self._parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Draw a filled rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" '
            f'height="{max(height, 0):.1f}" fill="{fill}"/>'
        )

    def line(self, begin: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        """Draw a line."""
        (x1, y1), (x2, y2) = begin, end
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
        )

    def dot(self, x: float, y: float, colour: str, radius: float = 1.8) -> None:
        """Draw a point."""
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity=".75"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        """Write a line of text."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Write names behind their colours above the drawing; what has no room is left out."""
        x = 4.0
        for name, colour in entries:
            width = 24 + _LETTER * len(name)
            if x + width > WIDTH:
                return
            self.rect(x, 8, 11, 11, colour)
            self.text(x + 15, 18, name)
            x += width

    def svg(self) -> str:
        """The element, named for screen readers."""
        label = escape(self._title, quote=True)
        return (
            f'<svg role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {WIDTH} {self.height:.0f}" width="{WIDTH}" height="{self.height:.0f}" '
            f'font-family="sans-serif" font-size="12" fill="currentColor">{"".join(self._parts)}'
            "</svg>"
        )


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from low to high, at most so many."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * f for f in (1, 2, 5, 10, 20) if span / (power * f) < most)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def linear(low: float, high: float, begin: float, end: float) -> Scale:
    """From values to pixels."""
    span = (high - low) or 1.0
    return lambda value: begin + (value - low) / span * (end - begin)


def logarithmic(low: float, high: float, begin: float, end: float) -> Scale:
    """From values above 0 to pixels, equal factors equally far apart."""
    inner = linear(math.log(low), math.log(high), begin, end)
    return lambda value: inner(math.log(value))


def powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [f * 10.0**e for e in exponents for f in (1, 2, 5)]
    return [value for value in found if low <= value <= high]


def axis_below(
    drawing: Drawing, scale: Scale, values: Sequence[float], top: float, name: str
) -> None:
    """Draw the horizontal axis with its grid, at the drawing's bottom."""
    bottom = drawing.height - BOTTOM
    for value in values:
        x = scale(value)
        drawing.line((x, top), (x, bottom), "#8884")
        drawing.text(x, bottom + 16, f"{value:g}", "middle")
    drawing.text((LEFT + WIDTH - RIGHT) / 2, bottom + 33, name, "middle")


def axis_beside(drawing: Drawing, scale: Scale, values: Sequence[float], name: str) -> None:
    """Draw the vertical axis with its grid, at the left."""
    for value in values:
        y = scale(value)
        drawing.line((LEFT, y), (WIDTH - RIGHT, y), "#8884")
        drawing.text(LEFT - 6, y + 4, f"{value:g}", "end")
    drawing.text(LEFT - 50, (TOP + drawing.height - BOTTOM) / 2, name, "end")
