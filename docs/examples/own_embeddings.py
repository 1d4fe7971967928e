"""Classes from embeddings of your own, such as a text encoder's that is not in the bundle."""

from argparse import ArgumentParser

import numpy as np

from zsseg_rt import Bundle, Engine
from zsseg_rt.demo import demo_photos
from zsseg_rt.photos import read_photo

ArgumentParser(description=__doc__).parse_args()

frame = read_photo(demo_photos("scenes")[1])
with Engine(Bundle.demo("scenes")) as engine:
    # Stands for another encoder: float32 [2, D], one row per class, in the bundle's joint space.
    embeds = engine.set_classes(["yellow sand", "grey sky"]).embeds
    middle = (embeds[0] + embeds[1]) / np.linalg.norm(embeds[0] + embeds[1])
    rows = np.stack([embeds[0], embeds[1], middle])

    engine.set_classes(["sand", "sky", "haze"], embeddings=rows)
    seg = engine.segment(frame, with_scores=True)

for entry in seg.present():
    print(f"{entry.name}: {entry.share:.0%}")
print(f"mean score {seg.scores.mean():.2f}")
