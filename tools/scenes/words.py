"""The world's words: what scenes are made of, the segmentation classes, the seen/unseen split."""

from __future__ import annotations

from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 38, 38),
    "orange": (238, 128, 28),
    "yellow": (232, 208, 48),
    "green": (58, 150, 58),
    "blue": (48, 92, 205),
    "purple": (132, 58, 165),
    "white": (240, 240, 238),
    "grey": (122, 122, 124),
}
SURFACES = ("metal", "wooden", "striped", "dotted", "checkered", "fuzzy")
SHAPES = ("ball", "box", "cone", "star", "ring", "cylinder")
UPRIGHTS = ("wall", "sky")
GROUNDS = ("floor", "grass", "sand", "water")
STUFF_SURFACES: dict[str, tuple[str, ...]] = {
    "wall": ("brick", "stone", "wooden", "striped"),
    "sky": ("",),
    "floor": ("tiled", "stone", "wooden", "checkered"),
    "grass": ("",),
    "sand": ("",),
    "water": ("",),
}


@dataclass(frozen=True)
class Kind:
    """The kind of a thing or a stretch of stuff.

    Attributes:
        colour: A key of :data:`COLOURS`.
        surface: A surface, or ``""`` for stuff that has only one.
        noun: A shape, or a key of :data:`STUFF_SURFACES`.
    """

    colour: str
    surface: str
    noun: str

    @property
    def name(self) -> str:
        """The full name, such as ``"red metal ball"`` or ``"blue sky"``."""
        return " ".join(word for word in (self.colour, self.surface, self.noun) if word)

    @property
    def is_thing(self) -> bool:
        """Whether it is an object rather than a stretch of stuff."""
        return self.noun in SHAPES


# Each unseen name recombines words of seen names; most differ from a seen name by one word.
_CLASSES: tuple[tuple[str, bool], ...] = (
    ("red metal ball", True),
    ("blue striped ball", True),
    ("green wooden box", True),
    ("yellow metal box", True),
    ("purple striped cone", True),
    ("orange wooden cone", True),
    ("blue dotted star", True),
    ("red checkered star", True),
    ("yellow dotted ring", True),
    ("purple checkered cylinder", True),
    ("green metal cylinder", True),
    ("red striped ball", False),
    ("blue metal box", False),
    ("green dotted cone", False),
    ("purple wooden star", False),
    ("yellow checkered ring", False),
    ("red brick wall", True),
    ("grey stone wall", True),
    ("blue sky", True),
    ("grey tiled floor", True),
    ("orange wooden floor", True),
    ("green grass", True),
    ("yellow sand", True),
    ("blue water", True),
    ("yellow brick wall", False),
    ("grey sky", False),
    ("red tiled floor", False),
    ("green water", False),
)
CLASS_NAMES: tuple[str, ...] = tuple(name for name, _ in _CLASSES)
SEEN: tuple[int, ...] = tuple(index for index, (_, seen) in enumerate(_CLASSES) if seen)


def kind_of(name: str) -> Kind:
    """The kind that a full name such as ``"red metal ball"`` stands for."""
    colour, *surface, noun = name.split()
    return Kind(colour, surface[0] if surface else "", noun)


def all_things() -> tuple[Kind, ...]:
    """Every kind of thing in the world, classes or not."""
    return tuple(Kind(c, surface, s) for c in COLOURS for surface in SURFACES for s in SHAPES)


def all_stuff(nouns: tuple[str, ...]) -> tuple[Kind, ...]:
    """Every kind of stuff with one of the nouns, classes or not."""
    return tuple(Kind(c, s, noun) for noun in nouns for c in COLOURS for s in STUFF_SURFACES[noun])


# Things that no pretraining caption names, to measure how words recombine; none is a class.
NEVER_CAPTIONED: tuple[str, ...] = tuple(
    kind.name
    for number, kind in enumerate(all_things())
    if number % 13 == 4 and kind.name not in CLASS_NAMES
)


def words_of_world() -> tuple[str, ...]:
    """Every colour, surface and noun, in the order of their tables."""
    surfaces = [s for choices in STUFF_SURFACES.values() for s in choices if s]
    return tuple(dict.fromkeys([*COLOURS, *SURFACES, *surfaces, *SHAPES, *UPRIGHTS, *GROUNDS]))
