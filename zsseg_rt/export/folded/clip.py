"""CLIP's prompted image tower for export, with all constants computed once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.models.clip.image_encoder import (
    PromptedImageEncoder,
    resize_positional_embedding,
    unit,
)
from zsseg_rt.models.clip.transformer import Mlp, ResidualBlock, merge_heads, split_heads


def fold_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[nn.LayerNorm, nn.Linear]:
    """Two layers that together give ``weight @ norm(x) + bias``, made for inference.

    The norm's scale and shift go into the projection, unless float16 holds its weight exactly, as
    it does CLIP's own: then the norm keeps them and the file stores the weight in half the bytes.
    """
    if torch.equal(weight.half().float(), weight.float()):
        return norm, linear_from(weight, bias)
    plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
    return plain, linear_from(weight * norm.weight, bias + weight @ norm.bias)


class FoldedBlock(nn.Module):
    """A residual block whose prompts are constant keys and values.

    Only class and patch tokens flow through; see :func:`fold_norm` for the norms. Queries, keys and
    values have a projection each, so that nothing is cut at run time, and the scale of the scores
    is part of the queries' weights, where it costs nothing. For heads 16 or 64 wide it is a power
    of two, so that weights which float16 holds stay so.
    """

    prompt_keys: Tensor
    prompt_values: Tensor

    def __init__(self, block: ResidualBlock, prompts: Tensor) -> None:
        super().__init__()
        width = prompts.shape[-1]
        self.num_heads = block.attn.num_heads
        self.norm_1, packed = fold_norm(
            block.ln_1, block.attn.in_proj_weight, block.attn.in_proj_bias
        )
        self.q_proj, self.k_proj, self.v_proj = _split(packed, (width // self.num_heads) ** -0.5)
        self.out_proj = block.attn.out_proj
        self.mlp = Mlp(width, block.mlp.c_fc.out_features, block.mlp.activation)
        self.norm_2, self.mlp.c_fc = fold_norm(
            block.ln_2, block.mlp.c_fc.weight, block.mlp.c_fc.bias
        )
        self.mlp.c_proj = block.mlp.c_proj
        _, keys, values = self._qkv(prompts[None])
        self.register_buffer("prompt_keys", keys.contiguous())
        self.register_buffer("prompt_values", values.contiguous())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ``[B, N, W]`` to ``[B, N, W]``; ``mask`` ``[N, N + P]`` is added to the scores."""
        q, k, v = self._qkv(x)
        if self.prompt_keys.shape[2]:
            k = torch.cat([k, self.prompt_keys.expand(x.shape[0], -1, -1, -1)], dim=2)
            v = torch.cat([v, self.prompt_values.expand(x.shape[0], -1, -1, -1)], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        x = x + self.out_proj(merge_heads(attended))
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed, heads = self.norm_1(x), self.num_heads
        return (
            split_heads(self.q_proj(normed), heads),
            split_heads(self.k_proj(normed), heads),
            split_heads(self.v_proj(normed), heads),
        )


def _split(packed: nn.Linear, scale: float) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Projections of queries, times ``scale``, of keys and of values."""
    (q, k, v), (q_bias, k_bias, v_bias) = packed.weight.chunk(3), packed.bias.chunk(3)
    return linear_from(q * scale, q_bias * scale), linear_from(k, k_bias), linear_from(v, v_bias)


def linear_from(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A frozen linear layer made from given tensors, detached and not copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


class FoldedImageEncoder(nn.Module):
    """A :class:`PromptedImageEncoder` for one input size, with everything constant precomputed.

    Equal to the encoder up to rounding: prompts are constant keys and values of each block (what
    blocks compute for prompts is never used), the class token starts as a constant, the positional
    embedding is already resized, norms are folded into the projections after them (see
    :func:`fold_norm`). No control flow depends on data. Evaluation only: it has no dropout.
    """

    cls_token: Tensor
    positions: Tensor

    def __init__(self, encoder: PromptedImageEncoder, size_hw: tuple[int, int]) -> None:
        super().__init__()
        self.size_hw = size_hw
        self.grid_hw = encoder.grid_hw(size_hw)
        with torch.no_grad():
            self._fold(encoder)
        self.eval()

    def _fold(self, encoder: PromptedImageEncoder) -> None:
        positions = resize_positional_embedding(encoder.positional_embedding, self.grid_hw)[1:]
        self.conv1 = encoder.conv1
        self.ln_pre = encoder.ln_pre
        self.register_buffer("positions", positions.clone())
        self.register_buffer("cls_token", encoder.ln_pre(encoder.class_token())[None, None])
        self.blocks = nn.ModuleList(FoldedBlock(*pair) for pair in encoder.layer_prompts())
        self.prompt_norm = encoder.prompt_norm
        no_bias = torch.zeros(encoder.config.embed_dim, device=positions.device)
        self.norm_post, self.proj = fold_norm(encoder.ln_post, encoder.proj.T, no_bias)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode images of the fixed size.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, *size_hw]``.

        Returns:
            ``patch_embeds`` ``[B, N, D]`` and ``cls_embed`` ``[B, D]``, both unit norm.
        """
        tokens = self.embed_patches(image)
        for block in self.blocks:
            tokens = block(tokens)
        embeds = self.project(self.prompt_norm(tokens))
        return embeds[:, 1:], embeds[:, 0]

    def embed_patches(self, image: Tensor) -> Tensor:
        """Class and patch tokens before the first block, ``[B, 1 + N, W]``."""
        patches = self.ln_pre(self.conv1(image).flatten(2).transpose(1, 2) + self.positions)
        return torch.cat([self.cls_token.expand(image.shape[0], -1, -1), patches], dim=1)

    def project(self, tokens: Tensor) -> Tensor:
        """Project tokens ``[B, N, W]`` into the joint space, ``[B, N, D]``, unit norm."""
        return unit(self.proj(self.norm_post(tokens)))
