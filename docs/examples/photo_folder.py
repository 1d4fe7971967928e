"""Label the photos of a folder: ``python photo_folder.py FOLDER``; without one, the demo's.

Writes, for each photo, a label image and a picture with names, and ``shares.csv`` for all. For
large folders ``zsseg-rt segment FOLDER`` does more: several photos at once, and ``--resume``.
"""

import csv
from argparse import ArgumentParser
from pathlib import Path

import cv2

from zsseg_rt import Bundle, Engine, SourceError, read_photo
from zsseg_rt.demo import demo_classes, demo_photos

parser = ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path)
folder = parser.parse_args().folder
photos = [Path(name) for name in demo_photos()]
if folder:
    photos = sorted(path for path in folder.iterdir() if path.is_file())
out = Path("labelled")
out.mkdir(exist_ok=True)

with Engine(Bundle.demo()) as engine, (out / "shares.csv").open("w", newline="") as file:
    engine.set_classes(demo_classes(), background="auto")
    table = csv.writer(file)
    table.writerow(["photo", "class", "share"])
    for path in photos:
        try:
            frame = read_photo(path)
        except SourceError as error:  # not a photo, or damaged: the others go on
            print(f"left out: {error}")
            continue
        seg = engine.segment(frame)
        seg.save(out / f"{path.stem}.labels.png")
        cv2.imwrite(str(out / f"{path.stem}.jpg"), cv2.cvtColor(seg.plot(frame), cv2.COLOR_RGB2BGR))
        for entry in seg.present():
            table.writerow([path.name, entry.name, f"{entry.share:.4f}"])
        print(f"{path.name}: {', '.join(entry.name for entry in seg.present()[:3])}")
