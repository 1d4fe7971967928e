"""How images and patches relate to the phrases of classes."""

from __future__ import annotations

from zsseg_rt import _C
from zsseg_rt.common.arrays import Array
from zsseg_rt.ops.core import native


def relationship_descriptor(
    cls_embed: Array,
    text_embeds: Array,
    weight: Array,
    bias: Array,
    *,
    text_queries: Array | None = None,
    out: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> Array:
    """Describe how an image relates to every class: ``[cls * text, text] Wᵀ + b``.

    The concatenation is never stored. Its text half does not depend on the image:
    :func:`relationship_descriptor_text` computes it once for many images.

    ``cls_embed``, ``text_embeds`` and ``weight`` are all float32, all float16 or all bfloat16; sums
    are float32. On CUDA, float16 and bfloat16 meet in the tensor cores, which get ``cls * text``
    rounded to that dtype. The same call gives the same bits every time.

    NumPy has no bfloat16: such arrays come through DLPack, as torch tensors do, on every device.

    Args:
        cls_embed: Global image embeddings ``[B, D]``.
        text_embeds: Class embeddings ``[C, D]``.
        weight: ``[E, 2 * D]``; the first D columns meet ``cls * text``.
        bias: float32 ``[E]``; not added again if ``text_queries`` is given.
        text_queries: ``relationship_descriptor_text(text_embeds, weight, bias)``, float32
            ``[C, E]``. Computed here if None.
        out: Array to write, ``[B, C, E]``, float32 or of the embeddings' dtype. A new float32 one
            if None.
        workspace: On CUDA, :data:`DEPTH_WORKSPACE_BYTES` bytes, uint8, at a multiple of 4, that are
            zeros before their first use and that no other call uses at the same time. With it,
            several blocks share the sums where the result alone would not fill the GPU; results
            then differ in rounding. Without it, or with fewer bytes, fewer blocks do.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ, or an array is not C-contiguous and aligned.
        DTypeError: An array has another dtype.
        ArgumentError: ``workspace`` is not at a multiple of 4.
        DeviceError: The arrays are not on one device, or the build has no CUDA.

    Source:
        Zhou et al., "ZegCLIP", CVPR 2023, Relationship Descriptor.
    """
    halves = (cls_embed, text_embeds, weight, bias, text_queries)
    return native(_C.relationship_descriptor, *halves, out, workspace, stream)


def relationship_descriptor_text(
    text_embeds: Array,
    weight: Array,
    bias: Array,
    *,
    out: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> Array:
    """Compute the half of :func:`relationship_descriptor` that does not depend on the image.

    ``text W[:, D:]ᵀ + b``.

    Args:
        text_embeds: Class embeddings ``[C, D]``, float32, float16 or bfloat16.
        weight: ``[E, 2 * D]``, of the same dtype.
        bias: float32 ``[E]``.
        out: Array to write, ``[C, E]``, float32 or of the embeddings' dtype. A new float32 one if
            None. Only float32 can be another call's ``text_queries``.
        workspace: As :func:`relationship_descriptor`'s.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ, or an array is not C-contiguous and aligned.
        DTypeError: An array has another dtype.
        ArgumentError: ``workspace`` is not at a multiple of 4.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    return native(
        _C.relationship_descriptor_text, text_embeds, weight, bias, out, workspace, stream
    )


def patch_text_similarity(
    patch_embeds: Array,
    text_embeds: Array,
    *,
    logit_scale: float = 1.0,
    normalize: bool = True,
    classes_last: bool = False,
    out: Array | None = None,
    finite: Array | None = None,
    workspace: Array | None = None,
    stream: int = 0,
) -> Array:
    """Compare every patch with every class: ``logit_scale * <patch, text>``, class-major.

    Accumulated in float32 for every input dtype; on CUDA, two float16 or two bfloat16 inputs meet
    in the tensor cores (bfloat16 from sm_80 on). The same call gives the same bits every time.

    Each input may be float32; beside it, or beside one of its own dtype, the other may be float16
    or bfloat16. NumPy has no bfloat16: such arrays come through DLPack, as torch tensors do, on
    every device.

    Args:
        patch_embeds: float32, float16 or bfloat16 ``[B, N, D]``.
        text_embeds: float32 or the patches' dtype, or any of the three beside float32;
            ``[C, D]``, or ``[B, C, D]`` if they differ by image.
        logit_scale: Finite factor.
        normalize: Divide every row by its L2 norm first (cosine). A row of zeros has similarity 0
            with everything.
        classes_last: Return ``[B, N, C]``, a patch's classes beside each other.
        out: Array to write, float32 ``[B, C, N]``, or ``[B, N, C]`` with ``classes_last``. A new
            one if None.
        finite: Array to write, uint8 ``[1]``, as :func:`all_finite` of the result does, in the
            same launch.
        workspace: On CUDA, ``finite`` needs 8 bytes, uint8, that are zeros before their first use
            and that no other call uses at the same time. Every call leaves zeros there. With
            :data:`DEPTH_WORKSPACE_BYTES` bytes, at a multiple of 4, the first 2048 zeros, several
            blocks share the sums where the result alone would not fill the GPU; results then differ
            in rounding.
        stream: CUDA stream to enqueue on.

    Returns:
        ``out``, on the inputs' device.

    Raises:
        ShapeError: Sizes differ, or an array is not C-contiguous and aligned.
        DTypeError: An array has another dtype.
        ArgumentError: ``logit_scale`` is not finite, or ``workspace`` is missing or too small.
        DeviceError: The arrays are not on one device, or the build has no CUDA.
    """
    settings = (logit_scale, normalize, classes_last)
    return native(
        _C.patch_text_similarity,
        patch_embeds,
        text_embeds,
        *settings,
        out,
        finite,
        workspace,
        stream,
    )
