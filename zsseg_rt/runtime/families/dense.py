"""Dense features against text: every patch gets the class whose text embedding is nearest.

Source: Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), ECCV 2022, for CLIP
encoders; any encoder whose patches live in the text space fits.
"""

from __future__ import annotations

from zsseg_rt.common.arrays import dtype_of
from zsseg_rt.runtime.families.base import (
    BoundClasses,
    ClassLogits,
    Family,
    FrameState,
    GoldenRule,
    Pipeline,
    adopt_rows,
)


class DensePipeline(Pipeline):
    """Compares every patch with every phrase."""

    of_cells = True

    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        """Copy the text embeddings, in float16 beside such patches: matrix units take one type."""
        patches = dtype_of("patch_embeds", self._image_encoder.outputs)
        text_dtype = "float16" if patches == "float16" else "float32"
        return adopt_rows(classes, num_rows, self._workspace, text_dtype=text_dtype)

    def masks(self, state: FrameState) -> ClassLogits:
        encoded = self._encode(state.image)
        masks = self._compare(encoded["patch_embeds"], state.classes.text_embeds)
        if state.trace is not None:
            state.trace.update(encoded, mask_logits=masks.mask_logits)
        return masks


class DenseFamily(Family):
    """Bundles of family ``dense``."""

    name, pipeline = "dense", DensePipeline
    golden = GoldenRule(
        stages=("image", "patch_embeds", "cls_embed", "mask_logits"), raw_logits=True
    )
