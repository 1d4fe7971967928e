"""What an encoder was trained to see, where that is known."""

from __future__ import annotations

from dataclasses import dataclass

from zsseg_rt.common.schema import check_plain_text


@dataclass(frozen=True, kw_only=True)
class ConceptSpec:
    """What a bundle's encoder was trained to see; names far from it are taken, with a remark.

    Attributes:
        names: What it was trained on.
        also: Further phrases that are known to be among these.
        least_cosine: A phrase whose embedding's cosine with every one of ``names`` is below this
            is remarked upon; None: embeddings tell nothing. Above it needs ``names`` that the
            bundle can embed.
        least_words: A phrase of fewer words is remarked upon unless it is among ``names``.
        background: Phrases for all that it does not see; ``background="auto"`` takes them.
    """

    names: tuple[str, ...]
    also: tuple[str, ...] = ()
    least_cosine: float | None = None
    least_words: int = 1
    background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names: expected at least one, got none")
        for key in ("names", "also", "background"):
            for index, name in enumerate(getattr(self, key)):
                check_plain_text(name, f"{key}[{index}]")
        if self.least_cosine is not None and not -1.0 <= self.least_cosine <= 1.0:
            raise ValueError(f"least_cosine: expected a cosine or null, got {self.least_cosine}")
        if self.least_words < 1:
            raise ValueError(f"least_words: expected at least 1, got {self.least_words}")
