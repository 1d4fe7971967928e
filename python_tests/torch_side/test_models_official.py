"""What ``from_official`` takes of every system, and how it refuses the rest: one table."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from support import golden_cat_seg, tiny, tiny_zegformer
from support.errors import refused
from zsseg_rt.errors import CheckpointError
from zsseg_rt.models import from_official, normalize_state_dict

CROSS = "multihead_attn.k.bias"
VISUAL = golden_cat_seg.CLIP + "visual."
PREDICTOR = "sem_seg_head.predictor."
FIRST = "backbone.transformer.resblocks.0."


class System(NamedTuple):
    """A tiny official ``state_dict``, what shapes do not tell, and how it may be damaged."""

    weights: Callable[[], dict[str, torch.Tensor]]
    settings: dict[str, Any]
    needed: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], str], ...]
    heads: tuple[str, ...]


SYSTEMS = {
    "zegclip": System(
        tiny.zegclip_state_dict,
        tiny.zegclip_config(),
        (
            "backbone.conv1.weight",
            "backbone.proj",
            "backbone.prompt_proj.bias",
            FIRST + "attn.in_proj_weight",
            "decode_head.q_proj.weight",
            "decode_head.decoder_1.layers.2." + CROSS,
            "text_encoder.ln_final.weight",
        ),
        (
            (FIRST + "ln_1.weight", (65,), r"ln_1\.weight \[65\] instead of \[64\]"),
            ("backbone.prompt_proj.weight", (64, 63), r"\[64, 63\] instead of \[64, 64\]"),
            ("backbone.conv1.weight", (64, 3, 16), "of 4 axes"),
            ("backbone.positional_embedding", (18, 64), "square grid, got 18 rows"),
            ("decode_head.decoder_1.layers.1.norm3.bias", (31,), r"\[31\] instead of \[32\]"),
            ("backbone.region_level_bridge", (4, 64), r"got backbone\.region_level_bridge unknown"),
        ),
        ("num_heads", "decoder_heads", "text_heads"),
    ),
    "clip_rc": System(
        tiny.clip_rc_state_dict,
        tiny.zegclip_config(),
        (
            "backbone.region_level_bridge",
            "decode_head.lateral_proj.bias",
            "decode_head.decoder_v.layers.2." + CROSS,
            "decode_head.recovery_decoder.linear_k_out.weight",
            "text_encoder.ln_final.weight",
        ),
        (
            ("backbone.region_level_bridge", (5, 64), "square grid, got 5 rows"),
            ("backbone.region_level_bridge", (0, 64), "square grid, got 0 rows"),
            ("backbone.region_level_bridge", (4, 63), r"\[4, 63\] instead of \[4, 64\]"),
            ("decode_head.lateral_proj.weight", (32, 64), r"\[32, 64\] instead of \[32, 96\]"),
            (
                "decode_head.decoder_1.layers.0.norm3.bias",
                (32,),
                r"norm3\.bias unknown",
            ),
        ),
        ("num_heads", "decoder_heads", "text_heads"),
    ),
    "zegformer": System(
        tiny_zegformer.state_dict,
        {"num_heads": 4},
        (
            "backbone.stem.conv1.weight",
            "backbone.res3.0.shortcut.norm.running_var",
            "sem_seg_head.pixel_decoder.adapter_2.norm.bias",
            PREDICTOR + "bg_feature",
            PREDICTOR + "transformer.decoder.layers.1.self_attn.in_proj_bias",
            PREDICTOR + "mask_embed.layers.0.weight",
            VISUAL + "class_embedding",
            PREDICTOR + "clip_model.logit_scale",
        ),
        (
            (
                "backbone.res2.0.conv2.weight",
                (8, 8, 1, 1),
                r"\[8, 8, 1, 1\] instead of \[8, 8, 3, 3\]",
            ),
            ("backbone.stem.conv1.weight", (8, 3, 7), "of 4 axes"),
            ("sem_seg_head.pixel_decoder.mask_features.weight", (32, 65, 3, 3), "multiple of 32"),
            (PREDICTOR + "input_proj.bias", (63,), r"\[63\] instead of \[64\]"),
            (VISUAL + "positional_embedding", (18, 64), "square grid, got 18 rows"),
            ("backbone.fc.weight", (2, 2), r"backbone\.fc\.weight"),
        ),
        ("num_heads", "clip_heads", "text_heads"),
    ),
    "cat_seg": System(
        golden_cat_seg.tiny_weights,
        golden_cat_seg.TINY_SETTINGS,
        ("upsample1.weight", VISUAL + "proj", VISUAL + "conv1.weight"),
        (
            ("backbone.stem.conv1.weight", (1, 1), "earlier generation"),
            (VISUAL + "conv1.weight", (64, 3, 14, 14), "CAT-Seg B"),
            (golden_cat_seg.HEAD + "layers.0.swin_block.block_2.attn_mask", (4, 16, 16), "window"),
            (PREDICTOR + "extra", (1,), "extra unknown"),
        ),
        ("num_heads", "clip_heads", "text_heads"),
    ),
}


def build(name, weights, **settings):
    return from_official(name, weights, **(SYSTEMS[name].settings | settings))


every_system = pytest.mark.parametrize("name", SYSTEMS)


@every_system
def test_weights_load_again_and_are_copies(name):
    weights = {key: value.clone() for key, value in SYSTEMS[name].weights().items()}
    model = build(name, weights)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for value in weights.values():
        value.zero_()
    assert tiny.same(model.state_dict(), before)
    if name != "cat_seg":  # which names its parts otherwise
        assert tiny.same(build(name, before).state_dict(), before)


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, system in SYSTEMS.items() for key in system.needed]
)
def test_a_missing_key_is_named(name, key):
    weights = {k: v for k, v in SYSTEMS[name].weights().items() if k != key}
    with pytest.raises(CheckpointError, match=re.escape(key)):
        build(name, weights)


@pytest.mark.parametrize(
    ("name", "key", "shape", "message"),
    [(name, *row) for name, system in SYSTEMS.items() for row in system.shapes],
)
def test_wrong_shapes_and_unknown_keys_are_named(name, key, shape, message):
    with pytest.raises(CheckpointError, match=message):
        build(name, SYSTEMS[name].weights() | {key: torch.zeros(shape)})


@every_system
@pytest.mark.parametrize("weights", [{}, {"fc.weight": torch.zeros(3, 3)}])
def test_other_weights_are_refused(name, weights):
    with refused(CheckpointError, "state_dict"):
        build(name, weights)
    other = "zegclip" if name == "clip_rc" else "clip_rc"
    with pytest.raises(CheckpointError):
        build(name, SYSTEMS[other].weights())


@pytest.mark.parametrize("heads", [5, 0, -1])
@pytest.mark.parametrize(
    ("name", "setting"), [(name, one) for name, system in SYSTEMS.items() for one in system.heads]
)
def test_heads_must_divide_the_width(name, setting, heads):
    with pytest.raises(CheckpointError, match="_heads: expected a divisor"):
        build(name, SYSTEMS[name].weights(), **{setting: heads})


@every_system
def test_wrapped_and_half_precision_weights_need_normalizing(name):
    weights = SYSTEMS[name].weights()
    wrapped = {f"module.{key}": value.half() for key, value in weights.items()}
    with refused(CheckpointError, "state_dict", "'module.'"):
        build(name, {f"module.{key}": value for key, value in weights.items()})
    with refused(CheckpointError, "state_dict", "float16", "normalize_state_dict"):
        build(name, {key: value.half() for key, value in weights.items()})
    plain = normalize_state_dict(wrapped)
    assert tiny.same(plain, {key: value.half().float() for key, value in weights.items()})
    build(name, plain)


@every_system
def test_whole_checkpoints_and_arrays_are_named(name):
    weights = SYSTEMS[name].weights()
    with refused(CheckpointError, "state_dict", "load_checkpoint"):
        build(name, {"meta": {}, "state_dict": weights})
    arrays = {key: value.numpy() for key, value in weights.items()}
    with refused(CheckpointError, "state_dict"):
        build(name, arrays)
