"""The published systems in torch. Nothing of the runtime imports this package."""

from zsseg_rt.common.extras import needs_extra

with needs_extra("torch", "for zsseg_rt.models"):
    import torch  # noqa: F401

from zsseg_rt.models.base import slide_predict
from zsseg_rt.models.clip.weights import build_image_encoder, build_text_encoder, load_clip
from zsseg_rt.models.registry import create_model, from_official
from zsseg_rt.torch_files.checkpoints import load_checkpoint, normalize_state_dict

__all__ = [
    "build_image_encoder",
    "build_text_encoder",
    "create_model",
    "from_official",
    "load_checkpoint",
    "load_clip",
    "normalize_state_dict",
    "slide_predict",
]
