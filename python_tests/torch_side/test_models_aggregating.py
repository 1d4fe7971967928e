"""SFP and SC-CLIP in torch; test_networks_aggregating.py compares them with official vectors."""

from __future__ import annotations

from typing import Any

import pytest

from support.errors import refused

torch = pytest.importorskip("torch")

from support.official_heads import model_of, weights_of  # noqa: E402
from zsseg_rt import models  # noqa: E402
from zsseg_rt.errors import ArgumentError, CheckpointError  # noqa: E402


def tiny(**changed: Any) -> dict[str, Any]:
    c = {"width": 64, "layers": 12, "heads": 4, "patch": 16, "grid": 6, "out": 32, "salt": "t"}
    base = {"gains": [], "method": "sfp", "pm": "L2", "res_cls": 0.3, "position": "official"}
    return c | base | changed


@torch.no_grad()
@pytest.mark.parametrize("head", ["maskclip", "sclip", "clearclip", "naclip"])
def test_the_other_heads_read_official_towers_too(head):
    weights = weights_of(tiny())
    model = models.from_official("dense_clip", weights, head=head, num_heads=4)
    logits = model(torch.randn(1, 3, 96, 64), torch.randn(2, 32)).mask_logits
    assert logits.shape == (1, 2, 6, 4)
    assert logits.abs().max() <= 1 + 1e-5  # cosines: logit_scale is 1
    larger = models.from_official("dense_clip", weights, head=head, num_heads=4, logit_scale=40.0)
    assert larger.logit_scale == 40.0


def test_a_trunk_with_too_few_blocks_is_refused():
    with refused(ArgumentError, "pre"):
        model_of(tiny(layers=6))


def test_damaged_towers_are_refused():
    weights = weights_of(tiny())
    del weights["ln_post.bias"]
    with refused(CheckpointError, "state_dict", "ln_post.bias"):
        models.from_official("dense_clip", weights, head="sfp", num_heads=4)
