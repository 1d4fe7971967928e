"""Count each class's pixels over time: ``python counting_pixels.py SOURCE``.

Writes ``counts.csv``: a row per frame with its time and the pixels of every class, for a plot or an
alarm. ``test://`` is a camera that needs nothing.
"""

import csv
from argparse import ArgumentParser
from pathlib import Path

from zsseg_rt import Bundle, Engine
from zsseg_rt.demo import demo_classes

parser = ArgumentParser(description=__doc__)
parser.add_argument("source", nargs="?", default="test://?frames=30")
source = parser.parse_args().source
most, begin = {}, None

with Engine(Bundle.demo()) as engine, Path("counts.csv").open("w", newline="") as file:
    names = engine.set_classes(demo_classes(), background="auto").names
    table = csv.writer(file)
    table.writerow(["frame", "seconds", *names, "unknown"])
    with engine.stream(source) as stream:
        for seg in stream:
            pixels = {entry.name: entry.pixels for entry in seg.present()}
            unknown = seg.labels.size - sum(pixels.values())
            counts = [pixels.get(name, 0) for name in names]
            begin = seg.frame.captured_at if begin is None else begin
            seconds = seg.frame.captured_at - begin
            table.writerow([seg.frame.index, f"{seconds:.3f}", *counts, unknown])
            for name, count in pixels.items():
                most[name] = max(count, most.get(name, 0))

for name in sorted(most, key=most.get, reverse=True)[:5]:
    print(f"{name}: up to {most[name]} pixels")
