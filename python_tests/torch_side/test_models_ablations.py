"""ZegCLIP with one of its designs switched off."""

from dataclasses import replace

import pytest
import torch

from support import tiny
from support.errors import refused
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models import from_official
from zsseg_rt.models.descriptor.model import ZegCLIP

SIZES = tiny.TinySizes()


def text_only(sizes: tiny.TinySizes = SIZES, **changes) -> ZegCLIP:
    state_dict = tiny.zegclip_state_dict(sizes)
    key = "decode_head.q_proj.weight"
    state_dict[key] = state_dict[key][:, SIZES.embed_dim :].contiguous()
    return from_official("zegclip", state_dict, **tiny.zegclip_config() | changes)


def test_queries_of_text_alone_do_not_see_the_picture():
    model = text_only()
    assert model.config.descriptor == "text"
    full = tiny.zegclip_state_dict()
    full["decode_head.q_proj.weight"][:, : SIZES.embed_dim] = 0
    expected = from_official("zegclip", full, **tiny.zegclip_config())
    image, text = tiny.image(2, 3, 64, 64), tiny.text_embeds(7, SIZES.embed_dim)
    with torch.no_grad():
        logits, expected_logits = (m(image, text).mask_logits for m in (model, expected))
    torch.testing.assert_close(logits, expected_logits)


def test_without_prompts_the_tower_is_clip_with_its_quirks():
    sizes = replace(SIZES, num_prompts=0)
    model = tiny.zegclip_model(sizes).eval()
    backbone = model.backbone
    image = tiny.image(2, 3, 64, 64)
    with torch.no_grad():
        tokens = backbone.transformer(backbone.embed_patches(image))
        embeds = backbone.project(backbone.prompt_norm(tokens))
        patches, cls_embed = backbone(image)
    expected = embeds / embeds.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.cat([cls_embed[:, None], patches], dim=1), expected)


@pytest.mark.parametrize("setting", ["descriptor", "score_activation"])
def test_unknown_choices_are_refused(setting):
    config = tiny.zegclip_model().config
    with refused(ArgumentError, setting, "none"):
        replace(config, **{setting: "none"})
