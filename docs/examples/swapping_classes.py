"""Change the classes between frames; nothing is compiled or loaded again."""

from argparse import ArgumentParser

from zsseg_rt import Bundle, Engine
from zsseg_rt.demo import demo_photos
from zsseg_rt.photos import read_photo

ArgumentParser(description=__doc__).parse_args()

frames = [read_photo(photo) for photo in demo_photos("scenes")]
with Engine(Bundle.demo("scenes")) as engine:
    things = engine.set_classes(["box", "star", "ring", "cone"], background=["wall", "sand", "sky"])
    stuff = engine.set_classes(["grey stone wall", "red tiled floor", "yellow sand", "grey sky"])
    for frame in frames:
        for vocabulary in (things, stuff):
            engine.set_classes(vocabulary)  # its embeddings are taken back, not computed anew
            seg = engine.segment(frame)
            # A result carries its own names and version: it cannot be read with other classes.
            print(seg.vocabulary_version, [entry.name for entry in seg.present()])
