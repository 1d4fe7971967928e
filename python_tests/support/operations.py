"""A sound call of every operation: its arrays and its settings."""

import numpy as np


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


BOXES = np.array([[0, 0, 7, 7], [1, 1, 3, 3]], np.int32)
OPERATIONS = {
    "preprocess": (
        {"frame": zeros(4, 4, 3, dtype=np.uint8), "out": zeros(3, 2, 2)},
        {"size_hw": (2, 2), "mean": (0.5,) * 3, "std": (0.5,) * 3},
    ),
    "relationship_descriptor": (
        {
            "cls_embed": zeros(1, 4),
            "text_embeds": zeros(2, 4),
            "weight": zeros(5, 8),
            "bias": zeros(5),
            "text_queries": zeros(2, 5),
            "out": zeros(1, 2, 5),
        },
        {},
    ),
    "relationship_descriptor_text": (
        {"text_embeds": zeros(2, 4), "weight": zeros(5, 8), "bias": zeros(5), "out": zeros(2, 5)},
        {},
    ),
    "patch_text_similarity": (
        {"patch_embeds": zeros(1, 3, 4), "text_embeds": zeros(2, 4), "out": zeros(1, 2, 3)},
        {},
    ),
    "upsample_argmax": (
        {"logits": zeros(1, 300, 2, 2), "seen": zeros(300, dtype=bool)},
        {"out_hw": (4, 4)},
    ),
    "overlay": (
        {
            "frame": zeros(4, 4, 3, dtype=np.uint8),
            "labels": zeros(4, 4, dtype=np.uint16),
            "palette": zeros(2, 3, dtype=np.uint8),
        },
        {},
    ),
    "ink": (
        {"picture": zeros(4, 4, 3, dtype=np.uint8), "weights": zeros(1, 4, 4, dtype=np.uint8)},
        {"place": (0, 0), "colours": [(1, 2, 3)]},
    ),
    "upsample_argmax_overlay": (
        {
            "logits": zeros(1, 3, 2, 2),
            "frame": zeros(4, 4, 3, dtype=np.uint8),
            "palette": zeros(3, 3, dtype=np.uint8),
            "seen": zeros(3, dtype=bool),
            "label_table": zeros(3, dtype=np.uint16),
            "picture": zeros(4, 4, 3, dtype=np.uint8),
        },
        {},
    ),
    "all_finite": ({"values": zeros(7, dtype=np.float16)}, {}),
    "count_labels": (
        {"labels": zeros(7, dtype=np.uint16), "out": zeros(4, dtype=np.int64)},
        {"num_classes": 3},
    ),
    "merge_windows": (
        {"logits": zeros(2, 3, 2, 2), "shares": zeros(2, 3), "out": zeros(1, 3, 2, 3)},
        {"places": [(0, 0), (0, 1)]},
    ),
    "warp_blend": (
        {
            "logits": zeros(1, 3, 2, 2),
            "past": zeros(1, 3, 2, 2),
            "flow": zeros(1, 2, 2, 2),
            "past_weight": zeros(1, 2, 2),
            "out": zeros(1, 3, 2, 2),
        },
        {},
    ),
    "mask_boxes": (
        {"mask_logits": zeros(2, 4, 4), "out": zeros(2, 5, dtype=np.int32)},
        {"canvas_hw": (8, 8)},
    ),
    "crop_regions": (
        {
            "image": zeros(3, 8, 8),
            "mask_logits": zeros(2, 4, 4),
            "regions": np.array([0, 1], np.int32),
            "boxes": BOXES,
            "out": zeros(2, 3, 2, 2),
        },
        {"side": 2},
    ),
    "label_regions": (
        {"mask_logits": zeros(2, 4, 4), "class_scores": zeros(3, 2), "bias": zeros(3)},
        {"canvas_hw": (8, 8), "out_hw": (8, 8)},
    ),
}
