"""A tiny ZeroSeg with weights by the reference rule; its segments differ clearly."""

from typing import Any

import torch

from support.tiny import rule_tensor
from zsseg_rt.models.zeroseg.model import ZeroSeg, ZeroSegConfig

SIZES: dict[str, Any] = {
    "width": 64,
    "num_layers": 2,
    "num_heads": 4,
    "grid_side": 4,
    "decoder_width": 32,
    "decoder_layers": 2,
    "decoder_heads": 4,
    "head_heads": 4,
    "group_tokens": (6, 4),
    "embed_dim": 32,
    "size_hw": (64, 64),
}
# Patches and groups that stand apart: without the factors all pixels fall into one segment.
GAINS = (
    ("group_token", 8.0),
    ("assign.q_proj.weight", 3.0),
    ("assign.k_proj.weight", 3.0),
    ("assign.v_proj.weight", 6.0),
    ("patch_embed.proj.weight", 5.0),
    ("grouping.mlp_channels.fc2.weight", 9.0),
)


def zeroseg_model(salt: str = "", **overrides: Any) -> ZeroSeg:
    """A tiny model in evaluation mode."""
    model = ZeroSeg(ZeroSegConfig(**(SIZES | overrides)))
    fixed = {"encoder.pos_embed", "decoder.decoder_pos_embed"}
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key not in fixed and value.is_floating_point() and "running" not in key:
                value.copy_(rule_tensor(key, value.shape, salt, GAINS))
    return model.eval()
