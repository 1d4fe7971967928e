"""CLIP-RC from CLIP weights, to be trained.

Source:
    Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.base import ScoreActivation
from zsseg_rt.models.clip.transformer import Activation
from zsseg_rt.models.clip.weights import load_clip
from zsseg_rt.models.descriptor.clip_rc import ClipRC, ClipRCConfig
from zsseg_rt.models.descriptor.mask_decoder import DecoderConfig
from zsseg_rt.models.descriptor.model import load_clip_towers, settings_from_clip
from zsseg_rt.models.descriptor.starts import COSINE_SCALE, Start, check_scale
from zsseg_rt.models.input_checks import read_class_indices

__all__ = ["clip_rc_from_clip"]


def clip_rc_from_clip(
    *,
    pretrained: str | Path,
    clip: str = "ViT-B-16",
    activation: Activation | None = None,
    num_prompts: int = 10,
    num_cells: int = 16,
    image_size: int = 512,
    patch_stride: int | None = None,
    decoder: DecoderConfig | None = None,
    seen_classes: Sequence[int] = (),
    self_trained: bool = False,
    score_activation: ScoreActivation = "sigmoid",
    exact: bool = False,
    with_recovery_decoder: bool = True,
    unit_inputs: bool = False,
    low_initial_logits: bool = False,
    start: Start = "random",
    start_offset: float = 0.0,
    start_scale: float | None = None,
    num_heads: int | None = None,
    text_heads: int | None = None,
    trust: bool = False,
) -> ClipRC:
    """Start CLIP-RC from CLIP weights, prompts and decode head initialised for training.

    The positional embedding is resized to ``image_size`` (bilinear). Every cell token starts,
    and stays, as the class embedding plus its position.

    Args:
        pretrained: A file or an open_clip tag; see :func:`zsseg_rt.models.clip.weights.load_clip`.
        clip: open_clip's name of the model, for a tag.
        activation: For a ``state_dict`` file, which does not store it.
        num_prompts: Visual prompts per layer; officially 10 for VOC, 100 for COCO-Stuff.
        num_cells: Cell tokens, a square number.
        image_size: Side of training crops, in pixels; a multiple of the patch size.
        patch_stride: Pixels from one patch to the next; None is the patch size, as officially.
        decoder: Sizes of the decoders; None is the official ones at CLIP's embedding width.
        seen_classes: Rows of the text embeddings that are trained on.
        self_trained: Whether training is self-training; see :class:`ClipRCConfig`.
        score_activation: What turns mask logits into probabilities; see :class:`ClipRCConfig`.
        exact: Whether to refuse other input sizes; see :class:`ClipRCConfig`.
        with_recovery_decoder: Whether to build the recovery decoder, which runs in training only.
        unit_inputs: Whether initial weights are scaled for the unit vectors that they read, for
            short trainings. Not official.
        low_initial_logits: Whether mask logits start as small as ZegCLIP's, for trainings at a
            high rate; see :meth:`CellDecodeHead.lower_initial_logits`. Not official.
        start: Initial weights of the decode head: ``"random"``; ``"copies"``, in which all layers
            of a decoder start as its first, as officially; ``"aligned"``, in which masks start as
            a multiple of the cosine of patch and name, see
            :mod:`zsseg_rt.models.descriptor.starts`. Not official.
        start_offset: Added to all mask logits of the aligned start, such as -3 for masks that
            start empty.
        start_scale: Factor on the cosine of the aligned start; None is 14, which
            training replaces by one that fits its names; see
            :func:`zsseg_rt.models.descriptor.starts.scale_for`.
        num_heads: Heads of the image tower, for a file; None is one per 64 channels.
        text_heads: Heads of the text tower, for a file; None is one per 64 channels.
        trust: See :func:`zsseg_rt.torch_files.checkpoints.load_checkpoint`.

    Returns:
        The model, in evaluation mode, with its text tower.

    Raises:
        ArgumentError: A setting is unknown, or ``num_cells`` is not a square number.
        CheckpointError: The weights cannot be read or are not a CLIP ViT's.
        ShapeError: Patches do not fill ``image_size`` exactly.
    """
    if num_cells < 1 or math.isqrt(num_cells) ** 2 != num_cells:
        raise ArgumentError(
            f"num_cells: expected a square number of at least 1, got {num_cells}. "
            "Officially it is 16."
        )
    if low_initial_logits and start == "aligned":
        raise ArgumentError(
            "low_initial_logits: expected False with start = 'aligned', which sets the logits "
            "itself, got True. Leave it out."
        )
    weights = load_clip(
        pretrained,
        architecture=clip,
        activation=activation,
        num_heads=num_heads,
        text_heads=text_heads,
        trust=trust,
    )
    settings = settings_from_clip(
        weights,
        image_size=image_size,
        num_prompts=num_prompts,
        decoder=decoder,
        num_cells=num_cells,
        patch_stride=patch_stride,
    )
    config = ClipRCConfig(
        **settings,
        seen_classes=read_class_indices("seen_classes", seen_classes),
        self_trained=self_trained,
        score_activation=score_activation,
        exact=exact,
        with_recovery=with_recovery_decoder,
    )
    model = ClipRC(config)
    load_clip_towers(model, weights)
    if unit_inputs:
        model.decode_head.scale_for_unit_inputs()
    scale = check_scale(start, start_scale)
    model.decode_head.start(start, start_offset)
    model.decode_head.scale_start(scale / COSINE_SCALE)
    if low_initial_logits:
        model.decode_head.lower_initial_logits()
    with torch.no_grad():
        token = weights.visual["class_embedding"] + weights.visual["positional_embedding"][0]
        model.backbone.region_level_bridge.copy_(token.expand(num_cells, -1))
    return model.eval()
