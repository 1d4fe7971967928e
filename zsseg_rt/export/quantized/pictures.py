"""Which pictures a bundle is quantised with: some set ranges, others only measure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from zsseg_rt.common.files import sha256_of
from zsseg_rt.errors import ArgumentError, DatasetError, SourceError
from zsseg_rt.evaluation.datasets.base import Sample, SegmentationDataset
from zsseg_rt.photos.files import find_photos, read_photo

FEWEST, MOST = 8, 512
_MOST_MEASURED = 128
_MOST_NAMED = 5  # of pictures that cannot be read
_HELD_BACK = 4  # one picture in so many is measured on, and gives no ranges

Picture = Callable[[], Sample]
"""Reads a picture; without a data set its labels are empty."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What ranges are from, and what is measured on; no picture is in both.

    Attributes:
        ranged: Give ranges.
        measured: Are measured on.
        hashes: Their SHA-256, those of files, or of a data set's pixels.
        dataset: What the measured ones and their masks are from; None without masks.
    """

    ranged: tuple[Picture, ...]
    measured: tuple[Picture, ...]
    hashes: tuple[str, ...]
    dataset: SegmentationDataset | None


def choose_pictures(
    photos: Path | None,
    dataset: SegmentationDataset | None,
    seed: int,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Pictures:
    """Choose pictures, and read each once, so that none stops the work that follows.

    Ranges are from the photos and figures from the data set; of one of them alone, a quarter is
    held back to measure on.

    Raises:
        ArgumentError: Neither is given, there are too few, or all are of one colour.
        SourceError: Pictures cannot be read; the first ones are named.
    """
    rng = np.random.default_rng(seed)
    ranged: Sequence[Picture] = ()
    if photos is not None:
        found = find_photos([str(photos)])
        ranged = [partial(_read, found[place]) for place in rng.permutation(len(found))[:MOST]]
        _require(len(found), FEWEST, "photos", str(photos))
    measured: Sequence[Picture] = ()
    if dataset is not None:
        order = rng.permutation(len(dataset))[:MOST]
        measured = [partial(dataset.__getitem__, int(place)) for place in order]
        _require(len(dataset), 2 if ranged else FEWEST, "dataset", dataset.name)
    if ranged and measured:
        measured = measured[:_MOST_MEASURED]
    else:
        both = [*ranged, *measured]
        count = min(max(2, len(both) // _HELD_BACK), _MOST_MEASURED)
        ranged, measured = both[:-count], both[-count:]
    if not ranged:
        raise ArgumentError(
            "photos: expected a folder of pictures or a data set, got neither. Give one of them."
        )
    return Pictures(
        ranged=tuple(ranged),
        measured=tuple(measured),
        hashes=_checked([*ranged, *measured], len(ranged), advance),
        dataset=dataset,
    )


def _read(photo: Path) -> Sample:
    return Sample(image=read_photo(photo), labels=np.zeros((0, 0), np.uint8), name=str(photo))


def _checked(
    pictures: Sequence[Picture], ranged: int, advance: Callable[[str, int, int], None]
) -> tuple[str, ...]:
    """The pictures' hashes."""
    hashes, plain, bad = list[str](), 0, list[str]()
    for place, picture in enumerate(pictures):
        try:
            sample = picture()
        except (SourceError, DatasetError) as exc:
            bad.append(str(exc))
            continue
        is_file = sample.labels.size == 0
        own = hashlib.sha256(sample.image.tobytes()).hexdigest
        hashes.append(sha256_of(Path(sample.name)) if is_file else own())
        plain += place < ranged and bool((sample.image == sample.image[0, 0]).all())
        advance("read", place + 1, len(pictures))
    if bad:
        more = f" (and {len(bad) - _MOST_NAMED} more)" if len(bad) > _MOST_NAMED else ""
        raise SourceError("; ".join(bad[:_MOST_NAMED]) + more)
    if plain == ranged:
        raise ArgumentError(
            f"photos: expected pictures with content, got {plain} of one colour each. Give "
            "pictures of what will be labelled."
        )
    return tuple(hashes)


def _require(found: int, fewest: int, argument: str, where: str) -> None:
    if found < fewest:
        raise ArgumentError(
            f"{argument}: expected at least {fewest} pictures (64 are better), found {found} in "
            f"{where}. Add more."
        )
