"""A bundle's engine as a segmenter to evaluate; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.common.files import sha256_of
from zsseg_rt.engine import Engine
from zsseg_rt.errors import ArgumentError
from zsseg_rt.text.class_names import join_synonyms, split_synonyms


class EngineSegmenter:
    """Labels images as the engine does in use: the whole image, resized to the bundle's input.

    Args:
        engine: An open engine for RGB; its classes are set here and must stay.
        class_names: One phrase per class; commas separate synonyms, of which the best one counts.
        embeddings: float32 ``[P, D]`` to use instead of the bundle's text side, a row per phrase.
        templates: Prompts with one ``{}`` each; the bundle's if None.
        protocol: ``"whole"``. Sliding windows average the scores of all classes over windows; an
            engine never holds these, only labels.

    Attributes:
        class_names: As given.

    Raises:
        ArgumentError: The protocol is not ``"whole"``, or the engine takes BGR.
        VocabularyError: The bundle cannot embed a name.
    """

    def __init__(
        self,
        engine: Engine,
        class_names: Sequence[str],
        *,
        embeddings: npt.NDArray[np.float32] | None = None,
        templates: Sequence[str] | None = None,
        protocol: str = "whole",
    ) -> None:
        if protocol != "whole":
            raise ArgumentError(
                f"protocol: expected 'whole' for a bundle, got {protocol!r}. An engine gives "
                "labels, not the scores that windows are averaged over; evaluate the torch model "
                "to slide."
            )
        if engine.config.channel_order != "rgb":
            raise ArgumentError(
                f"engine: expected channel_order 'rgb', got {engine.config.channel_order!r}. "
                "Data sets are RGB; create the engine with EngineConfig(channel_order='rgb')."
            )
        classes = split_synonyms(class_names)
        engine.set_classes(classes, embeddings=embeddings, background=(), templates=templates)
        self.class_names = join_synonyms(classes)
        self._engine = engine

    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.evaluation.evaluate.Segmenter`."""
        return self._engine.segment(image).labels

    def describe(self) -> dict[str, Any]:
        """Bundle, backend, device, precision, and the family's settings that were given.

        The hash of ``bundle.json`` covers all files.
        """
        engine, bundle = self._engine, self._engine.bundle
        given = {name: getattr(engine.config, name) for name in FAMILIES[bundle.family].settings}
        return {
            "kind": "bundle",
            "name": bundle.name,
            "architecture": bundle.architecture,
            "sha256": sha256_of(bundle.path / "bundle.json"),
            "protocol": "whole",
            "size_hw": list(bundle.preprocess.size_hw),
            "backend": engine.backend,
            "device": engine.device,
            "precision": engine.precision,
            "seen_bias": bundle.head.seen_bias if bundle.head.seen else 0.0,
            "settings": {name: value for name, value in given.items() if value is not None},
        }
