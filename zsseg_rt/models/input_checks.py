"""What several models refuse alike."""

from __future__ import annotations

from torch import Tensor

from zsseg_rt.errors import ShapeError

__all__ = ["check_size", "check_text_embeds"]


def check_size(size_hw: tuple[int, int], patch_size: int) -> None:
    """Refuse sizes that patches do not fill.

    Raises:
        ShapeError: A side is not a positive multiple of the patch size.
    """
    if min(size_hw) < 1 or any(side % patch_size for side in size_hw):
        raise ShapeError(
            f"image_size: expected multiples of the patch size {patch_size}, got "
            f"{size_hw[0]}x{size_hw[1]}. Choose the next multiple."
        )


def check_text_embeds(text_embeds: Tensor, embed_dim: int, name: str = "text_embeds") -> None:
    """Refuse class embeddings that are not of a model's joint space.

    Raises:
        ShapeError: They are not ``[C, embed_dim]`` with at least one class.
    """
    if text_embeds.ndim != 2 or text_embeds.shape[1] != embed_dim or not len(text_embeds):
        raise ShapeError(
            f"{name}: expected [C, {embed_dim}] with at least one class, "
            f"got {list(text_embeds.shape)}. Use embeddings of this model's text encoder."
        )
