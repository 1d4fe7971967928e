"""A bundle's engine that labels as a paper's code does: its windows, scores and thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from benchmarks.papers.protocol import Protocol
from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.evaluate import EngineSegmenter
from zsseg_rt.text.class_names import join_synonyms, split_synonyms

Maps = npt.NDArray[np.float32]

_LONGEST = 2048  # pixels of a resized picture's longer side
_MOST_CHANNELS = 64  # that cv2.resize is given at once
_STRIP = 1 << 23  # numbers of the maps at a picture's full size that exist at one time


class PublishedSegmenter:
    """Labels pictures by a paper's protocol; everything after the network is NumPy.

    A picture is resized, its windows are labelled by the engine one by one, their cosines are
    upsampled to the window's pixels and averaged, and resized to the picture. Then come the
    softmax over all phrases, the best phrase of each class, and the thresholds. The engine gives
    shares; their logarithm is the cosine times the bundle's scale, but for a number that all
    phrases of a cell share, which the softmax removes.

    Args:
        engine: An open engine of a CLIP with a dense head, made with :meth:`config`.
        protocol: What to follow.
        class_names: The data set's names, if the protocol has none of its own.
        templates: The prompts; a bundle without a text encoder ignores them.

    Shapes:
        U: Different phrases.

    Attributes:
        class_names: What is asked for, one entry per class.

    Raises:
        ArgumentError: The bundle is of another kind, or its input is not as large as a window.
        VocabularyError: The bundle cannot embed a name.
    """

    def __init__(
        self,
        engine: Engine,
        protocol: Protocol,
        class_names: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        _check(engine, protocol)
        groups = split_synonyms(protocol.classes or class_names)
        phrases = [phrase for group in groups for phrase in group]
        # COCO-Object has "bed" twice, which must stay exactly equal: then the first class has it.
        once = list(dict.fromkeys(phrases))
        prompts = None if engine.bundle.text.tokenizer is None else templates
        self._plain = EngineSegmenter(engine, once, templates=prompts)
        self._engine, self.protocol = engine, protocol
        self._rows = np.array([once.index(phrase) for phrase in phrases])
        self._times = np.bincount(self._rows).astype(np.float32)
        self._first = np.cumsum([0, *map(len, groups[:-1])])
        self.class_names = join_synonyms(groups)

    @staticmethod
    def config(config: EngineConfig) -> EngineConfig:
        """The settings of an engine for it."""
        return replace(config, with_class_scores="low")

    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.evaluation.evaluate.Segmenter`."""
        maps = self._in_windows(image) if self.protocol.crop else self._cosines(image)
        return self._labels(maps, (image.shape[0], image.shape[1]))

    def differences(self) -> tuple[str, ...]:
        """Where labels are made otherwise than by the paper's code, one sentence each."""
        protocol, bundle = self.protocol, self._engine.bundle
        size = "x".join(map(str, bundle.preprocess.size_hw))
        head = bundle.architecture.removeprefix("dense_clip ")
        differences = [
            f"weights: published with {protocol.weights}; those of {bundle.name} are not compared",
            f"precision: {self._engine.precision}; published in float16 on a GPU",
        ]
        if head != protocol.head:
            differences.append(f"head: published with {protocol.head}; the bundle is {head}")
        if not protocol.crop:
            differences.append(f"shape: whole pictures are stretched to the bundle's {size} pixels")
        if bundle.text.tokenizer is None:
            differences.append(
                "prompts: the bundle has no text encoder, only embeddings made earlier"
            )
        return tuple(differences + [protocol.differs] * bool(protocol.differs))

    def describe(self) -> dict[str, Any]:
        """Like an :class:`EngineSegmenter`, with the protocol and its :meth:`differences`."""
        followed = {"followed": vars(self.protocol), "differences": self.differences()}
        return self._plain.describe() | {"protocol": self.protocol.paper, "as_published": followed}

    def _cosines(self, window: npt.NDArray[np.uint8]) -> Maps:
        """Cosines [h, w, U] on the bundle's grid, but for a number that a cell's phrases share."""
        scores, head = self._engine.segment(window).class_scores, self._engine.bundle.head
        assert scores is not None, "the engine's config asks for them"
        if head.activation == "softmax":
            scores = np.log(np.maximum(scores, np.finfo(np.float32).tiny))
        return np.moveaxis(scores / np.float32(head.logit_scale), 0, -1)

    def _in_windows(self, image: npt.NDArray[np.uint8]) -> Maps:
        """The mean over windows [h, w, U] at the resized picture's pixels."""
        protocol, small = self.protocol, resized(image, self.protocol)
        height, width = small.shape[:2]
        crop, stride = protocol.crop, protocol.stride
        total = np.zeros((height, width, len(self._times)), np.float32)
        counts = np.zeros((height, width, 1), np.float32)
        for top in window_starts(height, crop, stride):
            for left in window_starts(width, crop, stride):
                part = (slice(top, top + crop), slice(left, left + crop))
                maps = _upsampled(self._cosines(np.ascontiguousarray(small[part])), (crop, crop))
                total[part] += self._shares(maps) if protocol.averaged == "shares" else maps
                counts[part] += 1
        total /= counts
        return total

    def _labels(self, maps: Maps, size_hw: tuple[int, int]) -> npt.NDArray[Any]:
        """Labels of a picture from its maps [h, w, U] at another size."""
        protocol, count = self.protocol, len(self.class_names)
        labels = np.empty(size_hw, label_dtype(count))
        kept = np.ones(count, np.float32)
        if protocol.area_thd:
            pixels = np.zeros(count, np.int64)
            for _, shares in self._class_shares(maps, size_hw):
                pixels += np.bincount(shares.argmax(-1).ravel(), minlength=count)
            kept[1:] = pixels[1:] > protocol.area_thd * pixels[1:].sum()
        for rows, shares in self._class_shares(maps, size_hw):
            shares *= kept
            best = shares.argmax(-1)
            labels[rows] = np.where(shares.max(-1) < protocol.prob_thd, 0, best)
        return labels

    def _class_shares(self, maps: Maps, size_hw: tuple[int, int]) -> Iterator[tuple[slice, Maps]]:
        """Each class's best share, strip by strip of the picture: [rows, W, C]."""
        height, width = size_hw
        step = max(1, _STRIP // (width * maps.shape[2]))
        places = (np.arange(height) + 0.5) * (maps.shape[0] / height) - 0.5
        places = np.clip(places, 0, maps.shape[0] - 1).astype(np.float32)
        above = places.astype(np.int64)
        below = np.minimum(above + 1, maps.shape[0] - 1)
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            part = (places[rows] - above[rows])[:, None, None]
            strip = maps[above[rows]] * (1 - part) + maps[below[rows]] * part
            strip = _upsampled(strip, (rows.stop - rows.start, width))
            if self.protocol.averaged == "cosines":
                strip = self._shares(strip * np.float32(self.protocol.logit_scale))
            yield rows, np.maximum.reduceat(strip[..., self._rows], self._first, axis=-1)

    def _shares(self, logits: Maps) -> Maps:
        """Softmax over all phrases, of which each of U counts as often as it is named."""
        shares: Maps = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= (shares * self._times).sum(-1, keepdims=True)
        return shares


def resized(image: npt.NDArray[np.uint8], protocol: Protocol) -> npt.NDArray[np.uint8]:
    """The picture at the protocol's size, uint8 [h, w, 3]; the short side holds a window."""
    height, width = image.shape[:2]
    short = protocol.short_side
    if protocol.resize == "bicubic":  # the longer side is rounded down
        from PIL import Image

        less = min(height, width)
        size_wh = (int(short * width / less), int(short * height / less))
        small = np.asarray(Image.fromarray(image).resize(size_wh, Image.Resampling.BICUBIC))
    else:
        factor = min(_LONGEST / max(height, width), short / min(height, width))
        size_wh = (int(width * factor + 0.5), int(height * factor + 0.5))
        small = cv2.resize(image, size_wh, interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    if min(size_wh) < protocol.crop:
        raise ArgumentError(
            f"image: expected a shape that leaves room for windows of {protocol.crop} pixels at "
            f"{size_wh[0]}x{size_wh[1]}, got {width}x{height}. Leave this picture out."
        )
    return small


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last one is moved back to the edge."""
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [min(index * stride, size - crop) for index in range(count)]


def _check(engine: Engine, protocol: Protocol) -> None:
    bundle = engine.bundle
    head, size_hw = bundle.head, bundle.preprocess.size_hw
    if bundle.family != "dense" or not head.normalize or head.activation == "sigmoid":
        raise ArgumentError(
            "bundle: expected logits that are cosines of patches and names, for a paper on dense "
            f"CLIP; got {bundle.name} ({bundle.architecture}, family {bundle.family}). Use one "
            "that export dense-clip made."
        )
    wanted = (protocol.crop, protocol.crop)
    if (size_hw == wanted) if protocol.crop else (min(size_hw) == protocol.short_side):
        return
    side = protocol.crop or protocol.short_side
    room = f"{side}x{side}" if protocol.crop else f"a short side of {side}, such as {side}x448,"
    command = protocol.command.format(head=protocol.head)
    raise ArgumentError(
        f"bundle: expected an input of {room} pixels, as {protocol.paper} has on "
        f"{protocol.dataset}, got {size_hw[0]}x{size_hw[1]}. Export one from the same weights "
        f"(zsseg-rt fetch NAME --keep-checkpoint keeps them): zsseg-rt {command} --size "
        f"{side if protocol.crop else f'{side}x448'} --out NAME.zsseg"
    )


def _upsampled(maps: Maps, size_hw: tuple[int, int]) -> Maps:
    """Bilinear, half-pixel centres, edges repeated: [h, w, U] to [H, W, U]."""
    height, width = size_hw
    if maps.shape[:2] == size_hw:
        return maps
    parts = [
        cv2.resize(
            np.ascontiguousarray(maps[..., first : first + _MOST_CHANNELS]), (width, height)
        ).reshape(height, width, -1)
        for first in range(0, maps.shape[2], _MOST_CHANNELS)
    ]
    return np.concatenate(parts, axis=2).astype(np.float32, copy=False)
