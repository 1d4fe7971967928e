"""How a paper evaluates on a data set: sizes, windows, names, thresholds; read from JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from zsseg_rt.common.schema import decode
from zsseg_rt.errors import ArgumentError

# Sets without background take the other one's names but the first.
_WITH_BACKGROUND = {"voc20": "voc21", "context59": "context60"}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The steps of a paper's code on one data set.

    Attributes:
        paper: Its name here.
        dataset: The data set's.
        source: Where the settings were read.
        figures: Where ``miou`` comes from.
        head: What CLIP's last block was replaced with.
        weights: The encoder that published figures belong to.
        short_side: Pixels of the resized picture's shorter side; the longer has at most 2048.
        crop: Side of a window in pixels; 0 takes the whole picture.
        stride: Pixels from a window to the next.
        logit_scale: Factor of the cosines before the softmax over all phrases.
        prob_thd: A pixel whose best share is lower becomes the first class.
        area_thd: A class but the first with at most this share of their pixels is dropped.
        resize: ``"bilinear"`` (OpenCV) or ``"bicubic"`` (Pillow, antialiased).
        averaged: What windows average: ``"cosines"``, or ``"shares"`` of a softmax.
        names: The list of names, for messages.
        classes: One entry per class in the data set's order, commas between synonyms; empty:
            the data set's names.
        templates: The prompts; empty: CLIP's 80 for ImageNet.
        miou: The published mIoU in percent, if one was read.
        differs: What is known to be otherwise here.
        command: What makes a bundle, but for its size and place.
    """

    paper: str
    dataset: str
    source: str
    figures: str
    head: str
    short_side: int
    crop: int
    stride: int
    logit_scale: float
    weights: str = "OpenAI's CLIP ViT-B/16"
    prob_thd: float = 0.0
    area_thd: float = 0.0
    resize: str = "bilinear"
    averaged: str = "cosines"
    names: str = ""
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    miou: float | None = None
    differs: str = ""
    command: str = "export dense-clip --clip FILE --head {head}"

    def sentence(self) -> str:
        """The protocol in one line."""
        windows = f"windows of {self.crop} every {self.stride} pixels" if self.crop else "whole"
        phrases = sum(len(entry.split(", ")) for entry in self.classes)
        parts = (
            f"pictures with a short side of {self.short_side}, {windows}",
            f"{len(self.templates) or 80} prompts",
            f"names: {self.names}" + (f" ({phrases} phrases)" if phrases else ""),
            f"scale {self.logit_scale:g}, prob_thd {self.prob_thd:g}, area_thd {self.area_thd:g}",
            "no PAMR",
        )
        return f"as published: {self.paper} on {self.dataset} ({self.source}): {'; '.join(parts)}"


def papers() -> tuple[str, ...]:
    """Names of the papers."""
    return tuple(_read("papers"))


def read_protocol(paper: str, dataset: str) -> Protocol:
    """How a paper evaluates on a data set.

    Raises:
        ArgumentError: There is no such paper here, or it has no settings for the data set.
    """
    if paper not in papers():
        raise ArgumentError(
            f"paper: expected one of {', '.join(papers())}, all without PAMR, got {paper!r}. "
            "PAMR is not computed here."
        )
    entry = _read("papers")[paper]
    if dataset not in entry["sets"]:
        raise ArgumentError(
            f"dataset: expected one that {paper} has settings for, {', '.join(entry['sets'])}; "
            f"got {dataset!r}. Use one of these, or evaluate without a paper's settings."
        )
    raw = entry["usual"] | entry["sets"][dataset]
    raw.setdefault("names", _WITH_BACKGROUND.get(dataset, dataset))
    raw |= {name: entry[name] for name in ("source", "figures", "differs") if name in entry}
    lists = _read("names")
    classes = lists[raw["names"]].split("; ") if raw["names"] in lists else []
    raw["classes"] = classes[dataset in _WITH_BACKGROUND :]
    return decode(Protocol, {"paper": paper, "dataset": dataset, **raw}, f"{paper} on {dataset}")


@cache
def _read(name: str) -> dict[str, Any]:
    path = Path(__file__).with_name(f"{name}.json")
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
