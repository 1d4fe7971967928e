"""CLIP's image tower with a dense head, run by :mod:`zsseg_rt.networks` on torch's tensors.

The modules hold weights and check images; what is computed is written once, there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from zsseg_rt.models.clip.image_encoder import (
    ImageEmbeds,
    ImageEncoder,
    ImageEncoderConfig,
    Interpolation,
)
from zsseg_rt.networks import heads
from zsseg_rt.networks.clip import ImageTower
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.on_torch import OnTorch

Head = Literal["vanilla", "maskclip", "sclip", "clearclip", "naclip", "sfp", "sc_clip"]
HEADS: tuple[Head, ...] = get_args(Head)
Position = Literal["as_published", "size"]


class TensorOperations(Arrays):
    """Operations on tensors of any floating dtype; constants take that of what they meet."""

    def __init__(self) -> None:
        super().__init__(xp=_Tensors(torch))


class _Tensors(OnTorch):
    def asarray(self, value: Any, like: Any) -> Any:
        """See :meth:`OnTorch.asarray`."""
        made = super().asarray(value, like)
        both = made.is_floating_point() and like.is_floating_point()
        return made.to(like.dtype) if both else made

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Products in the wider dtype."""
        wide = torch.promote_types(a.dtype, b.dtype)
        return torch.matmul(a.to(wide), b.to(wide))


class DenseImageEncoder(ImageEncoder):
    """CLIP's image tower with a dense head; the positional embedding is resized bicubically.

    Args:
        config: Sizes.
        head: One of :data:`zsseg_rt.networks.heads.HEADS`.
        **options: Those of :func:`zsseg_rt.networks.heads.dense_embeds`.
    """

    position_mode: ClassVar[Interpolation] = "bicubic"

    def __init__(self, config: ImageEncoderConfig, head: Head = "naclip", **options: Any) -> None:
        super().__init__(config)
        self.head_name, self.options = head, options
        if "aggregation" in options:
            options["aggregation"].check_depth(config.num_layers)

    def parts(self) -> dict[str, Any]:
        """What a tower of networks is made of; weights stay where they are."""
        config = self.config
        tensors = dict(self.named_parameters())
        return {"tensors": tensors, "num_heads": config.num_heads, "activation": config.activation}

    def forward(self, image: Tensor) -> ImageEmbeds:
        """Encode images.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            The head's patch embeddings, and CLIP's own class embedding, which no head changes;
            unit norm.
        """
        self.check_image(image)
        ops, tower = TensorOperations(), ImageTower(**self.parts())
        patches = heads.dense_embeds(ops, tower, image, self.head_name, **self.options)
        return ImageEmbeds(patches, heads.class_embed(ops, tower))
