"""How a bundle of family ``proposals`` turns segments into class scores."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FUSIONS", "STYLES", "RegionEncoderSpec", "RegionSpec"]

FUSIONS = ("seen_and_unseen", "all_classes", "regions", "segments")
STYLES = ("cropmask", "mask", "crop")


@dataclass(frozen=True, kw_only=True)
class RegionEncoderSpec:
    """What a second network, CLIP, is shown of each segment, and how it is asked.

    Attributes:
        side: Side of a crop in pixels.
        batch: The most crops that are cut out and encoded at once.
        style: What is shown: ``"cropmask"``, ``"mask"`` or ``"crop"``; see
            :func:`zsseg_rt.ops.crop_regions`.
        mean: Per-channel mean of RGB in 0..1.
        std: Per-channel standard deviation of RGB in 0..1.
        logit_scale: Multiplies the cosine of regions and classes.
        templates: Prompts with one ``{}`` each, for this network.
        min_score: Segments whose probability of being any class is lower are not shown, unless
            they are empty, which costs nothing; 0 shows all.
    """

    side: int
    batch: int
    style: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    logit_scale: float
    templates: tuple[str, ...]
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.side <= 1024:
            raise ValueError(f"side: expected from 1 to 1024, got {self.side}")
        if not 1 <= self.batch <= 64:
            raise ValueError(f"batch: expected from 1 to 64, got {self.batch}")
        if self.style not in STYLES:
            raise ValueError(f"style: expected one of {STYLES}, got {self.style!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected values > 0, got {self.std}")
        if not 0.0 <= self.min_score <= 1.0:
            raise ValueError(f"min_score: expected a probability, got {self.min_score}")
        if not self.templates or any(text.count("{}") != 1 for text in self.templates):
            raise ValueError(f"templates: expected one '{{}}' in each, got {self.templates}")


@dataclass(frozen=True, kw_only=True)
class RegionSpec:
    """Segments and how two opinions about them become one.

    Attributes:
        num_regions: Segments a picture.
        fusion: ``"segments"``: the segment's own class probabilities p count. ``"regions"``: those
            of the second network, p', do. ``"all_classes"``: ``p^(1/3) p'^(2/3)``.
            ``"seen_and_unseen"``: that for unseen classes, ``p^(2/3) m^(1/3)`` for seen ones, m
            being the mean of p' over seen classes.
        encoder: The second network; None exactly if ``fusion`` is ``"segments"``.
    """

    num_regions: int
    fusion: str
    encoder: RegionEncoderSpec | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_regions <= 256:
            raise ValueError(f"num_regions: expected from 1 to 256, got {self.num_regions}")
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion: expected one of {FUSIONS}, got {self.fusion!r}")
        if (self.encoder is None) != (self.fusion == "segments"):
            raise ValueError(f"encoder: expected one unless fusion is 'segments', {self.fusion!r}")
