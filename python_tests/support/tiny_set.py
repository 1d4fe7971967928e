"""A set of tiny weights that a test may add to those that can be fetched."""

from __future__ import annotations

from functools import cache

from safetensors.torch import save

from support import tiny
from zsseg_rt.bundles.pretrained import PretrainedSet

SIZES = tiny.TinySizes(num_layers=2, text_vocab=49408, text_length=77)
FILE = "open_clip_model.safetensors"
REPOSITORY = "someone/tiny-clip"
KEY = f"{REPOSITORY}/{FILE}"


@cache
def weights_file(salt: str = "", num_layers: int = SIZES.num_layers) -> bytes:
    """A weights file as the hub has them."""
    sizes = tiny.TinySizes(num_layers=num_layers, text_vocab=49408, text_length=77)
    return save({k: v.contiguous() for k, v in tiny.clip_state_dict(sizes, salt).items()})


@cache
def tiny_set(name: str = "tiny-set", head: str = "naclip") -> PretrainedSet:
    """Its entry."""
    numbers = sum(value.numel() for value in tiny.clip_state_dict(SIZES).values())
    return PretrainedSet(
        name=name,
        repository=REPOSITORY,
        clip="ViT-tiny",
        tag="made_on_the_spot",
        head=head,
        activation="quick_gelu",
        num_parameters=numbers,
        licence="none",
        good_for="tests",
        size=64,
    )
