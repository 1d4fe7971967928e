"""ZeroSeg's segmentation head: patches are grouped into 32, then 8 segments.

Source:
    Chen et al., ZeroSeg, ICCV 2023, for the layer counts; Xu et al., "GroupViT: Semantic
    Segmentation Emerges from Text Supervision", CVPR 2022, for the grouping block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.models.clip.transformer import attend
from zsseg_rt.models.zeroseg.config import Projection, ZeroSegConfig
from zsseg_rt.models.zeroseg.encoder import NORM_EPS, Block, Mlp


class Assignment(NamedTuple):
    """How inputs are assigned to groups.

    Attributes:
        hard: One 1 per column, ``[B, S, L]``: the group of each input; gradients are those of the
            softmax it was made from.
        soft: Softmax over the groups, without noise, ``[B, S, L]``.
    """

    hard: Tensor
    soft: Tensor


def hard_assignment(logits: Tensor, *, tau: float, noisy: bool) -> Tensor:
    """Assign every input to one group, with the gradient of a softmax (straight-through).

    Shapes:
        logits: Float32 ``[B, S, L]``; groups are axis 1.

    Returns:
        ``[B, S, L]``, one 1 per column, zeros elsewhere.
    """
    if noisy:
        return F.gumbel_softmax(logits, tau=tau, hard=True, dim=1)
    groups = torch.arange(logits.shape[1], device=logits.device)[:, None]
    one_hot = (logits.argmax(dim=1, keepdim=True) == groups).to(logits.dtype)
    if not torch.is_grad_enabled():
        return one_hot
    soft = logits.softmax(dim=1)
    return one_hot - soft.detach() + soft


class _CrossAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.q_proj(query), self.k_proj(memory), self.v_proj(memory)
        return self.proj(attend(q, k, v, self.num_heads))  # type: ignore[no-any-return]


class _CrossBlock(nn.Module):
    """Group tokens attend to the inputs; the norm comes at the end, not before."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = _CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, 4 * width)
        self.norm_post = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        query = query + self.attn(query, memory)
        query = query + self.mlp(self.norm2(query))
        return self.norm_post(query)  # type: ignore[no-any-return]


class _Assign(nn.Module):
    """Assign the inputs to groups and average each group's values."""

    def __init__(self, width: int, *, tau: float, eps: float) -> None:
        super().__init__()
        self.tau, self.eps, self.scale = tau, eps, width**-0.5
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, groups: Tensor, inputs: Tensor) -> tuple[Tensor, Assignment]:
        keys = self.k_proj(inputs).transpose(1, 2)
        logits = ((self.q_proj(groups) @ keys) * self.scale).float()
        hard = hard_assignment(logits, tau=self.tau, noisy=self.training)
        shares = hard / (hard.sum(dim=2, keepdim=True) + self.eps)
        gathered = self.proj(shares.to(inputs.dtype) @ self.v_proj(inputs))
        return gathered, Assignment(hard, logits.softmax(dim=1))


class _TokenMlp(Mlp):
    """A GELU MLP over the token axis: ``[B, S, C]`` to ``[B, S', C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GroupingBlock(nn.Module):
    """GroupViT's grouping block: inputs ``[B, L, C]`` become segments ``[B, S, C]``."""

    def __init__(
        self, width: int, num_heads: int, num_groups: int, *, tau: float = 1.0, eps: float = 1.0
    ) -> None:
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp_inter = _TokenMlp(num_groups, width // 2)
        self.norm_post_tokens = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm_x = nn.LayerNorm(width, eps=NORM_EPS)
        self.pre_assign_attn = _CrossBlock(width, num_heads)
        self.assign = _Assign(width, tau=tau, eps=eps)
        self.norm_new_x = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp_channels = Mlp(width, 4 * width)

    def forward(self, x: Tensor, group_tokens: Tensor) -> tuple[Tensor, Assignment]:
        """Group ``x`` ``[B, L, C]`` by ``group_tokens`` ``[B, S, C]``."""
        groups = self.norm_post_tokens(self.mlp_inter(self.norm_tokens(group_tokens)))
        x = self.norm_x(x)
        groups = self.pre_assign_attn(groups, x)
        gathered, assignment = self.assign(groups, x)
        segments = gathered + groups
        return segments + self.mlp_channels(self.norm_new_x(segments)), assignment


class _GroupProjector(nn.Sequential):
    """From the previous stage's group tokens to this one's: a norm and an MLP over tokens."""

    def __init__(self, width: int, num_before: int, num_groups: int) -> None:
        super().__init__(
            nn.LayerNorm(width, eps=NORM_EPS), _TokenMlp(num_before, width // 2, num_groups)
        )


class _Stage(nn.Module):
    """Blocks over tokens and group tokens, then a grouping; the last stage has no groups."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_layers: int,
        drop_path: float,
        groups: nn.Module | None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads, drop_path) for _ in range(num_layers))
        if groups is not None:
            self.grouping = groups

    def run_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _GroupingStage(_Stage):
    def __init__(
        self,
        width: int,
        num_heads: int,
        num_layers: int,
        drop_path: float,
        grouping: GroupingBlock,
        counts: tuple[int, int],
    ) -> None:
        super().__init__(width, num_heads, num_layers, drop_path, grouping)
        num_before, num_groups = counts
        self.group_token = nn.Parameter(torch.zeros(1, num_groups, width))
        self.group_projector = (
            _GroupProjector(width, num_before, num_groups) if num_before else None
        )

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor, Assignment]:
        tokens = self.group_token.expand(len(x), -1, -1)
        if self.group_projector is not None and before is not None:
            tokens = tokens + self.group_projector(before)
        joint = self.run_blocks(torch.cat([x, tokens], dim=1))
        x, tokens = joint[:, : x.shape[1]], joint[:, x.shape[1] :]
        segments, assignment = self.grouping(x, tokens)
        return segments, tokens, assignment


class SegmentOutput(NamedTuple):
    """What the segmentation head returns, not normalised.

    Attributes:
        segment_embeds: Segments in the teacher's space, ``[B, S2, D]``.
        image_embed: The image in the same space, ``[B, D]``.
        first: Assignment of patches to the first groups, ``[B, S1, L]``.
        second: Assignment of the first groups to segments, ``[B, S2, S1]``.
    """

    segment_embeds: Tensor
    image_embed: Tensor
    first: Assignment
    second: Assignment

    def group_map(self) -> Tensor:
        """Soft share of every segment in every patch, ``[B, S2, L]``; a patch's shares sum to 1."""
        return self.second.soft @ self.first.soft


class SegmentationHead(nn.Module):
    """Two grouping stages, one more block over the segments, one projection for all."""

    def __init__(self, config: ZeroSegConfig) -> None:
        super().__init__()
        width, drop_path = config.head_width, config.drop_path
        self.input_proj: nn.Module = nn.Identity()
        if width != config.width:
            self.input_proj = nn.Linear(config.width, width)
        before = (0, config.group_tokens[0])
        stages: list[nn.Module] = [
            _GroupingStage(
                width,
                config.head_heads,
                config.head_layers[index],
                drop_path,
                self._grouping(config, count),
                (before[index], count),
            )
            for index, count in enumerate(config.group_tokens)
        ]
        stages.append(_Stage(width, config.head_heads, config.head_layers[2], drop_path, None))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.projection = config.projection
        self.proj = nn.Sequential(
            nn.Linear(width, config.projection_width),
            *_between(config.projection, config.projection_width),
            nn.Linear(config.projection_width, config.embed_dim),
        )
        taps = config.segment_tap == "second_grouping"
        self.tap = nn.Linear(width, config.embed_dim) if taps else None

    @staticmethod
    def _grouping(config: ZeroSegConfig, count: int) -> GroupingBlock:
        return GroupingBlock(
            config.head_width,
            config.head_heads,
            count,
            tau=config.gumbel_tau,
            eps=config.assign_eps,
        )

    def forward(self, patch_tokens: Tensor) -> SegmentOutput:
        """Group the encoder's visible patches ``[B, L, encoder_width]``."""
        x = self.input_proj(patch_tokens)
        first_segments, first_tokens, first = self.stages[0](x)
        segments, _, second = self.stages[1](first_segments, first_tokens)
        last = self.stages[2]
        assert isinstance(last, _Stage)
        hidden = self.norm(last.run_blocks(segments))
        embeds = self._project(hidden) if self.tap is None else self.tap(segments)
        image_embed = self._project(hidden.mean(dim=1, keepdim=True))[:, 0]
        return SegmentOutput(embeds, image_embed, first, second)

    def _project(self, tokens: Tensor) -> Tensor:
        if self.projection == "gelu":
            return self.proj(tokens)  # type: ignore[no-any-return]
        batch, count, _ = tokens.shape  # batch norm counts every token as a sample
        return self.proj(tokens.flatten(0, 1)).reshape(batch, count, -1)  # type: ignore[no-any-return]


def _between(projection: Projection, width: int) -> tuple[nn.Module, ...]:
    return (nn.GELU(),) if projection == "gelu" else (nn.BatchNorm1d(width), nn.ReLU())
