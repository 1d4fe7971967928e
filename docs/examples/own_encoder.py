"""Run an image encoder of your own: from a torch module to a bundle to labels.

Needs ``pip install '.[train]'`` in a checkout; the bundle then runs without torch. What counts is
that patches and texts live in one space: a pixel takes the text that is nearest to its patch. A
CLIP in open_clip's format needs none of this: ``zsseg-rt export dense-clip``.
"""

from argparse import ArgumentParser
from pathlib import Path

ArgumentParser(description=__doc__).parse_args()  # --help works without torch

import cv2
import numpy as np
import torch

from zsseg_rt import Engine, read_photo
from zsseg_rt.demo import demo_photos
from zsseg_rt.export import export_dense_bundle, verify_bundle

SIDE, PATCH = 256, 4
COLOURS = {
    "yellow": (0.8, 0.75, 0.1),
    "grey": (0.45, 0.45, 0.45),
    "red": (0.85, 0.2, 0.2),
    "green": (0.2, 0.6, 0.3),
    "brown": (0.5, 0.4, 0.15),
}


class Encoder(torch.nn.Module):
    """Stands for your CLIP's image tower: its space is colour."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """From float32 [1, 3, H, W], normalised, to patch embeddings [1, D, H / 4, W / 4]."""
        colour = torch.nn.functional.avg_pool2d(image, PATCH)
        return torch.cat([colour, torch.ones_like(colour[:, :1])], dim=1)


def embed(name: str) -> np.ndarray:
    """Stands for your CLIP's text tower: the dot product is largest for the nearest colour."""
    colour = np.array(COLOURS[name], np.float32)
    return np.append(2 * colour, 1 - colour @ colour).astype(np.float32)


example = torch.zeros(1, 3, SIDE, SIDE)
torch.onnx.export(
    Encoder().eval(),
    (example,),
    "encoder.onnx",
    input_names=["image"],
    output_names=["embeds"],
    dynamo=False,  # the exporter that needs nothing besides torch
)
bundle = export_dense_bundle(
    "encoder.onnx",
    "colours.zsseg",
    image_size=SIDE,
    mean=(0.0, 0.0, 0.0),  # CLIP's: (0.481, 0.458, 0.408) and (0.269, 0.261, 0.276)
    std=(1.0, 1.0, 1.0),
    text_bank=(list(COLOURS), np.stack([embed(name) for name in COLOURS])),
    normalize=False,  # CLIP's embeddings are compared by their cosine: True, the default
    logit_scale=50.0,
    overwrite=True,
)
print(f"agrees with the graph: {verify_bundle(bundle).passed}")

frame = read_photo(Path(demo_photos("scenes")[0]))
with Engine(bundle) as engine:
    engine.set_classes(["red", "green", "grey"], background=["yellow", "brown"])
    seg = engine.segment(frame)
cv2.imwrite("colours.jpg", cv2.cvtColor(seg.plot(frame), cv2.COLOR_RGB2BGR))
for entry in seg.present():
    print(f"{entry.name}: {entry.share:.0%}")
