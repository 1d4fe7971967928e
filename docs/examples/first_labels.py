"""Name classes, get a label for every pixel."""

from argparse import ArgumentParser

from zsseg_rt import Bundle, Engine
from zsseg_rt.demo import demo_photos
from zsseg_rt.photos import read_photo

ArgumentParser(description=__doc__).parse_args()

with Engine(Bundle.demo()) as engine:  # or Engine("street.zsseg")
    engine.set_classes(["dining table", ["chair", "armchair"]], background="auto")
    seg = engine.segment(read_photo(demo_photos()[0]))  # uint8 [H, W, 3], RGB

for entry in seg.present():
    print(f"{entry.name}: {entry.share:.0%} of the picture")
seg.save("mask.png")  # a pixel's value is an index into seg.names
print(f"mask.png: {seg.labels.shape[0]} rows of {seg.labels.shape[1]} labels")
