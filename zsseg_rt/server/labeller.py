"""The engine as the server uses it: frames in its own lane, clients' pictures in a spare one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.settings import is_share
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError, EngineStateError, VocabularyError
from zsseg_rt.photos import decode_photo
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.runtime.lane import Lane
from zsseg_rt.server.settings import Limits
from zsseg_rt.text.class_names import BACKGROUND, Background, ClassNames
from zsseg_rt.text.vocabulary import Vocabulary

_SETTLE = 0.25  # seconds that the next change waits for a frame with the classes of the last
_REMEMBERED = 16  # versions of the classes whose frames may still be on their way


class Labeller:
    """Labels the stream's frames and clients' pictures with the same classes and threshold."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        if engine.vocabulary is None:
            raise EngineStateError("engine: expected classes, got none. Call set_classes first.")
        self._engine, self.limits = engine, limits
        self.unknown_below = engine.config.unknown_below or 0.0
        self._spare: Lane | None = None  # for pictures, once there is one
        self._spare_lock = threading.Lock()
        self._is_seen = threading.Event()  # whether a frame has been labelled with these classes
        self._is_seen.set()
        self._described = {self.vocabulary.version: self.describe(self.vocabulary)}

    @property
    def channel_order(self) -> str:
        return self._engine.config.channel_order

    @property
    def vocabulary(self) -> Vocabulary:
        vocabulary = self._engine.vocabulary
        if vocabulary is None:
            raise EngineStateError("engine: is closed. Start the server again.")
        return vocabulary

    @property
    def known_names(self) -> tuple[str, ...]:
        """The names of the bundle's text bank, or those that it was trained on; none without."""
        bank, concepts = self._engine.bundle.text_bank, self._engine.bundle.concepts
        if bank is not None:
            return tuple(bank.names)
        return () if concepts is None else concepts.names

    @property
    def known_words(self) -> tuple[str, ...]:
        """The words of which the bundle's text encoder knows any phrase; none: not only these."""
        return tuple(self._engine.bundle.text.words)

    def set_classes(self, classes: ClassNames, background: Background = None) -> Vocabulary:
        """Name other classes, from the next frame on; for one thread."""
        # Each of many changes gets a frame, unless none comes: else viewers would see hardly any.
        _refuse_long_names(classes, background, self.limits.name_length)
        self._is_seen.wait(_SETTLE)
        vocabulary = self._engine.set_classes(classes, background=background)
        self._is_seen.clear()
        recent = list(self._described.items())[1 - _REMEMBERED :]
        self._described = {**dict(recent), vocabulary.version: self.describe(vocabulary)}
        return vocabulary

    def set_unknown_below(self, value: float) -> None:
        if not is_share(value):
            raise ArgumentError(f"unknown_below: expected a score in [0, 1], got {value}")
        self.unknown_below = value

    def segment_frame(self, image: Any, **options: Any) -> Segmentation:
        """Label a frame of the stream, uint8 [H, W, 3], or one on the engine's GPU."""
        seg = self._engine.segment(image, unknown_below=self.unknown_below, **options)
        if seg.vocabulary_version == self.vocabulary.version:
            self._is_seen.set()
        return seg

    def segment_picture(self, content: bytes) -> tuple[npt.NDArray[np.uint8], Segmentation]:
        """A client's picture, uint8 [H, W, 3] in the engine's channel order, and its labels."""
        image = decode_photo(content, Path("image"), max_pixels=self.limits.picture_pixels)
        if self.channel_order == "bgr":
            image = np.ascontiguousarray(image[..., ::-1])
        return image, self.segment_beside(image)

    def segment_beside(self, image: npt.NDArray[np.uint8]) -> Segmentation:
        """Label an image, uint8 [H, W, 3], while frames of the stream are labelled."""
        with self._spare_lock:
            if self._spare is None:
                self._spare = self._engine.lane(spare=True)
            return self._spare.segment(image, unknown_below=self.unknown_below)

    def close(self) -> None:
        """Give the spare lane back, after the image under way."""
        with self._spare_lock:
            if self._spare is not None:
                self._spare.close()

    def describe(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """Classes as clients see them: a class's label is its position."""
        colours = palette(vocabulary.names).tolist()
        synonyms: list[list[str]] = [[] for _ in vocabulary.names]
        owners = vocabulary.phrase_classes.tolist()
        for phrase, owner in zip(vocabulary.phrases, owners, strict=True):
            if owner != BACKGROUND:
                synonyms[owner].append(phrase)
        return {
            "version": vocabulary.version,
            "classes": [
                {"name": name, "synonyms": phrases[1:], "colour": colour}
                for name, phrases, colour in zip(vocabulary.names, synonyms, colours, strict=True)
            ],
            "background": list(vocabulary.background),
            "auto_background": vocabulary.auto_background,
            "remarks": list(vocabulary.remarks),
            "unknown_label": int(np.iinfo(vocabulary.label_table.dtype).max),
            "unknown_below": self.unknown_below,
        }

    def describe_version(self, version: int) -> dict[str, Any] | None:
        """The classes that had this version; None if that was many changes ago."""
        in_force = self.vocabulary
        if in_force.version == version:
            return self.describe(in_force)
        classes = self._described.get(version)
        return None if classes is None else {**classes, "unknown_below": self.unknown_below}


def _refuse_long_names(classes: ClassNames, background: Background, longest: int) -> None:
    names = [name for entry in classes for name in ([entry] if isinstance(entry, str) else entry)]
    rivals = [background] if isinstance(background, str) else background or ()
    for argument, texts in (("class_names", names), ("background", rivals)):
        if (most := max(map(len, texts), default=0)) > longest:
            raise VocabularyError(
                f"{argument}: expected names of at most {longest} characters, got one of {most}. "
                "Use a short phrase."
            )
