"""Dense features against text: every patch takes the class whose text embedding is nearest.

Source: Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), ECCV 2022, for CLIP
encoders; any encoder whose patches live in the text space fits.
"""

from __future__ import annotations

import numpy as np

from zsseg_rt import ops
from zsseg_rt.backends.base import Array, Session
from zsseg_rt.bundle import Bundle
from zsseg_rt.pipelines.base import BoundClasses, GraphLoader, Trace, seen_phrases
from zsseg_rt.pipelines.masks import ClassLogits
from zsseg_rt.vocabulary import Vocabulary
from zsseg_rt.workspace import StageClock, Workspace, reshaped

__all__ = ["DensePipeline"]


class DensePipeline:
    """Runs bundles of family ``dense``."""

    def __init__(self, bundle: Bundle, load: GraphLoader, workspace: Workspace) -> None:
        self._head = bundle.head
        self._workspace = workspace
        self._image_encoder = load("image_encoder")

    @property
    def sessions(self) -> dict[str, Session]:
        """The loaded graphs by name."""
        return {"image_encoder": self._image_encoder}

    def bind(self, vocabulary: Vocabulary) -> BoundClasses:
        """Place the text embeddings on the device."""
        return BoundClasses(
            vocabulary=vocabulary,
            seen=seen_phrases(vocabulary.phrases, self._head),
            text_embeds=self._workspace.place(vocabulary.embeds),
        )

    def masks(
        self, image: Array, classes: BoundClasses, clock: StageClock, trace: Trace | None = None
    ) -> ClassLogits:
        """Compare every patch with every phrase; see :class:`Pipeline`."""
        stream = self._workspace.stream
        encoded = self._image_encoder.run({"image": image}, stream=stream)
        patch_embeds = encoded["patch_embeds"]
        clock.mark("image_encoder")
        phrases = len(classes.vocabulary.phrases)
        shape = (1, phrases, patch_embeds.shape[1])
        logits = ops.patch_text_similarity(
            patch_embeds,
            classes.text_embeds,
            logit_scale=self._head.logit_scale,
            normalize=self._head.normalize,
            out=self._workspace.array("mask_logits", shape, np.float32),
            stream=stream,
        )
        clock.mark("similarity")
        mask_logits = reshaped(logits, (1, phrases, *self._head.grid_hw))
        if trace is not None:
            trace.update(encoded, mask_logits=mask_logits)
        return ClassLogits(mask_logits=mask_logits)
