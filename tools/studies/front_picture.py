"""Draw README's picture: the four photos of the demo, and a drawn scene with classes never seen.

The photos are as ``segment --demo --legend`` writes them. In the scene, whose names have colours in
them, classes get colours that the things do not have; else labels could not be told from things.

    python -m tools.studies.front_picture docs/images/demo.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from zsseg_rt import Bundle, Engine, EngineConfig, Segmentation, read_photo
from zsseg_rt.demo import demo_classes, demo_photos
from zsseg_rt.results.plot import LegendEntry, draw_names, legend_strip
from zsseg_rt.results.visualize import palette

Pixels = npt.NDArray[np.uint8]

SCENE = "playroom"
COLUMNS = (("dining_room", "bird"), ("pickup", "dog_walk"), (SCENE,))
OTHERS = ("dining table", "bus", "cow", "person", "dog", "chair", "sheep", "train", "bottle")
WIDTH, GAP = 480, 12


def photos() -> dict[str, Pixels]:
    """The photos with names and legends, as the command draws them, by their stems."""
    with Engine(Bundle.demo(), EngineConfig(device="cpu")) as engine:
        engine.set_classes(demo_classes(), background="auto")
        frames = {Path(photo).stem: read_photo(photo) for photo in demo_photos()}
        return {stem: engine.segment(frame).plot(frame) for stem, frame in frames.items()}


def scene() -> dict[str, Pixels]:
    """The drawn scene, likewise, with other colours."""
    path = next(photo for photo in demo_photos("scenes") if Path(photo).stem == SCENE)
    frame = read_photo(path)
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu")) as engine:
        engine.set_classes(demo_classes("scenes"))
        return {SCENE: draw(engine.segment(frame), frame)}


def draw(seg: Segmentation, frame: Pixels) -> Pixels:
    """The drawing of ``plot``, but in the colours of things that are not there."""
    colours = np.zeros((len(seg.names), 3), np.uint8)
    there = seg.present()
    colours[[one.index for one in there]] = palette(OTHERS)[: len(there)]
    scale = np.ones((2, 2, 1), np.uint8)
    image = np.kron(seg.overlay(frame, colours=colours), scale)
    parts = [
        (part.name, np.kron(part.mask, scale[..., 0]) > 0, (2 * part.box[0], 2 * part.box[1]))
        for part in seg.components(min_area=seg.labels.size // 200)
    ]
    draw_names(image, parts)
    entries = [
        LegendEntry(one.name, one.share, tuple(colours[one.index].tolist())) for one in there
    ]
    return np.concatenate([image, legend_strip(image.shape[1], entries)])


def column(images: list[Pixels]) -> Pixels:
    """Pictures of one width, one below the other, on white."""
    parts = []
    for image in images:
        height = round(image.shape[0] * WIDTH / image.shape[1])
        small = cv2.resize(image, (WIDTH, height), interpolation=cv2.INTER_AREA)
        parts += [np.asarray(small, np.uint8), np.full((GAP, WIDTH, 3), 255, np.uint8)]
    return np.concatenate(parts[:-1])


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    file = str(parser.parse_args().file)
    drawn = {**photos(), **scene()}
    columns = [column([drawn[stem] for stem in stems]) for stems in COLUMNS]
    height = max(one.shape[0] for one in columns)
    padded = [
        np.pad(one, ((0, height - one.shape[0]), (0, GAP), (0, 0)), constant_values=255)
        for one in columns
    ]
    image = np.concatenate(padded, axis=1)[:, :-GAP]
    cv2.imwrite(file, image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
