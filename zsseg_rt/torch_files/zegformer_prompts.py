"""The prompts that ZegFormer's two branches embed class names in.

Source:
    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022, and its configurations.
"""

from __future__ import annotations

SINGLE_TEMPLATE = ("A photo of a {} in the scene",)
"""Text branch of the VOC models, and of the R101 COCO-Stuff model in evaluation."""

SEGMENT_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    *SINGLE_TEMPLATE,
)
"""Text branch of the other models (official ``imagenet_select``)."""

REGION_TEMPLATES = (
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a cropped photo of a {}.",
    *(
        f"This is a {look}photo of a {size}{{}}"
        for look in ("", "masked ", "cropped ")
        for size in ("", "small ", "medium ", "large ")
    ),
    *(
        f"{start} in the scene"
        for start in (
            "A photo of a {}",
            "a bad photo of the {}",
            "a photo of the large {}",
            "a photo of the small {}",
            "a cropped photo of a {}",
            "a photo of a masked {}",
            "There is a {}",
            "There is the {}",
            "This is a {}",
            "This is the {}",
            "This is one {}",
            "There is a masked {}",
            "There is the masked {}",
            "This is a masked {}",
            "This is the masked {}",
            "This is one masked {}",
        )
    ),
)
"""CLIP branch of every model."""
