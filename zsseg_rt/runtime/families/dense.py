"""Dense features against text: every patch gets the class whose text embedding is nearest.

Source: Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), ECCV 2022, for CLIP
encoders; any encoder whose patches live in the text space fits.
"""

from __future__ import annotations

from zsseg_rt.common.arrays import Array, dtype_of
from zsseg_rt.runtime.clock import StageClock
from zsseg_rt.runtime.families.base import (
    BoundClasses,
    Family,
    GoldenRule,
    PartRunner,
    Pipeline,
    Trace,
    adopt_rows,
    cell_logits,
)
from zsseg_rt.runtime.families.masks import ClassLogits


class DensePipeline(Pipeline):
    """Compares every patch with every phrase."""

    of_cells = True

    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        """Copy the text embeddings, in float16 beside such patches: matrix units take one type."""
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
        mask_logits = cell_logits(patch_embeds, classes.text_embeds, self._head, self._workspace)
        clock.mark("similarity")
        if trace is not None:
            trace.update(encoded, mask_logits=mask_logits)
        return ClassLogits(mask_logits=mask_logits)


class DenseFamily(Family):
    """Bundles of family ``dense``."""

    name, pipeline = "dense", DensePipeline
    golden = GoldenRule(
        stages=("image", "patch_embeds", "cls_embed", "mask_logits"), raw_logits=True
    )
