"""Dense features against text: every patch gets the class whose text embedding is nearest.

Source: Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), ECCV 2022, for CLIP
encoders; any encoder whose patches live in the text space fits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from zsseg_rt import ops
from zsseg_rt.backends.base import ANY_PRECISION, Bounds, Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import HeadSpec
from zsseg_rt.common.arrays import Array, dtype_of, reshaped
from zsseg_rt.config import EngineConfig
from zsseg_rt.runtime.clock import StageClock
from zsseg_rt.runtime.families.base import BoundClasses, GoldenRule, PartRunner, Trace
from zsseg_rt.runtime.families.class_rows import adopt_rows, bucket_of
from zsseg_rt.runtime.families.masks import ClassLogits
from zsseg_rt.runtime.workspace import Workspace
from zsseg_rt.text.prompts import PromptSet
from zsseg_rt.text.vocabulary import Vocabulary


def class_axis(head: HeadSpec) -> dict[str, Bounds]:
    """The axis of phrases, which is open in graphs that take them, and that of windows."""
    axes = {"classes": (1, min(32, head.max_classes), head.max_classes)}
    most = head.window_batch
    return axes if most == 1 else axes | {"windows": (1, most, most)}


class DenseFamily:
    """Bundles of family ``dense``; see :class:`zsseg_rt.runtime.families.base.Family`."""

    name = "dense"
    graphs = ("image_encoder",)
    auto_precisions = ANY_PRECISION
    golden = GoldenRule(
        stages=("image", "patch_embeds", "cls_embed", "mask_logits"), raw_logits=True
    )

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        self.head = bundle.head
        self.axes = class_axis(bundle.head)
        self.prompt_sets = (PromptSet(templates=bundle.text.templates),)

    in_one_part = True

    def rows_for(self, num_phrases: int) -> int:
        """Phrases are compared one by one, so that further rows change nothing."""
        return bucket_of(num_phrases, self.head.max_classes)

    def bind(self, vocabulary: Vocabulary, *, device: str = "cpu") -> BoundClasses:
        """Find the phrases that training saw."""
        return BoundClasses(
            vocabulary=vocabulary,
            seen=vocabulary.seen(self.head.seen),
            text_embeds=vocabulary.embeds,
        )

    def pipeline(self, sessions: Mapping[str, Session], workspace: Workspace) -> DensePipeline:
        """Make the pipeline of one lane."""
        return DensePipeline(self.head, sessions["image_encoder"], workspace)


class DensePipeline:
    """Compares every patch with every phrase; see ``Pipeline``."""

    def __init__(self, head: HeadSpec, image_encoder: Session, workspace: Workspace) -> None:
        self._head, self._image_encoder, self._workspace = head, image_encoder, workspace

    @property
    def checks_masks(self) -> bool:
        """On a GPU."""
        return self._workspace.device != "cpu"

    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        """Copy the text embeddings and how labels are made of phrases.

        Beside patches in float16 the embeddings are rounded to float16 too: matrix units multiply
        two arrays of one type.
        """
        patches = dtype_of("patch_embeds", self._image_encoder.outputs)
        text_dtype = "float16" if patches == "float16" else "float32"
        return adopt_rows(classes, num_rows, self._workspace, text_dtype=text_dtype)

    def masks(
        self,
        image: Array,
        classes: BoundClasses,
        clock: StageClock,
        run: PartRunner,
        trace: Trace | None = None,
    ) -> ClassLogits:
        """Run the encoder and compare."""
        stream = self._workspace.stream
        encoded = self._image_encoder.run({"image": image}, stream=stream)
        patch_embeds = encoded["patch_embeds"]
        clock.mark("image_encoder")
        windows, phrases = patch_embeds.shape[0], classes.text_embeds.shape[0]
        shape = (windows, phrases, patch_embeds.shape[1])
        products = self._workspace.products()
        logits = ops.patch_text_similarity(
            patch_embeds,
            classes.text_embeds,
            logit_scale=self._head.logit_scale,
            normalize=self._head.normalize,
            out=self._workspace.array("mask_logits", shape, np.float32),
            finite=None if products is None else self._workspace.flag()[1],
            workspace=products,
            stream=stream,
        )
        clock.mark("similarity")
        mask_logits = reshaped(logits, (windows, phrases, *self._head.grid_hw))
        if trace is not None:
            trace.update(encoded, mask_logits=mask_logits)
        return ClassLogits(mask_logits=mask_logits)
