"""SFP's and SC-CLIP's official vectors, and models of their weights."""

from __future__ import annotations

from typing import Any

from support.golden import case_of, load
from support.tiny import TinySizes, rule_state_dict, visual_shapes
from zsseg_rt import models

SMALL = [
    *(f"sfp_{pm}" for pm in ("som", "l2", "lof")),
    *("sfp_som_tight", "sfp_som_wide", "sfp_som_wide_size_pos", "sfp_l2_tall"),
    *("sfp_som_few", "sfp_som_none", "sfp_isolated_l2", "sfp_isolated_som"),
    *("sc", "sc_tight", "sc_wide", "sc_wide_size_pos", "sc_6_layers"),
]


def small(shared_dir: Any, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and settings of a case."""
    method = "sfp" if case.startswith("sfp") else "scclip"
    return case_of(load(shared_dir, f"{method}_small_public.npz"), case)


def weights_of(c: dict[str, Any]) -> dict[str, Any]:
    """An image tower by the vectors' rule, named as in OpenAI's CLIP."""
    sizes = TinySizes(
        width=c["width"],
        num_layers=c["layers"],
        patch_size=c["patch"],
        grid_side=c["grid"],
        embed_dim=c["out"],
    )
    return rule_state_dict(visual_shapes("", sizes), c["salt"], c["gains"])


def model_of(c: dict[str, Any], **changed: Any) -> Any:
    """A dense CLIP with the settings of a case."""
    settings = {
        "head": "sfp" if c["method"] == "sfp" else "sc_clip",
        "pm": c["pm"].lower(),
        "r": c["res_cls"],
        "position": "as_published" if c["position"] == "official" else "size",
        "num_heads": c["heads"],
        **{name: c[name] for name in ("pre", "post", "first", "end") if name in c},
    }
    return models.from_official("dense_clip", weights_of(c), **settings | changed)
