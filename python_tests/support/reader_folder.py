"""The folder of a reader of the documents: bundles, photos, settings of a training run."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np

from support.colour_words import colour_embeds, write_encoder
from support.small_runs import TABLES, save_clip
from zsseg_rt.demo import demo_photos
from zsseg_rt.export import export_dense_bundle
from zsseg_rt.photos import read_photo
from zsseg_rt.training.config import TrainConfig

NAMES = ["road", "person", "pedestrian", "forklift", "sky"]


def add_bundles(folder: Path) -> None:
    """The reader's own, whose every class is a colour."""
    embeds = colour_embeds()[1]
    bank = NAMES, embeds[: len(NAMES)]
    write_encoder(folder / "encoder.onnx")
    export_dense_bundle(
        folder / "encoder.onnx",
        folder / "street.zsseg",
        image_size=256,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        text_bank=bank,
        normalize=False,
    )
    for name in ("zegclip.zsseg", "sfp-b16"):
        shutil.copytree(folder / "street.zsseg", folder / name)


def add_run(folder: Path) -> None:
    """A configuration that trains for two steps."""
    clip = save_clip(folder / "clip.safetensors")
    options = {"pretrained": clip.name, "activation": "quick_gelu", "image_size": 64}
    own = {"evaluation": {"limit": 2}, "output": {"folder": "runs/photos"}}
    tables = TABLES | own | {"model": {"architecture": "zegclip", "options": options}}
    (folder / "photos.toml").write_text(TrainConfig.from_dict(tables).to_toml())


def add_photos(folder: Path) -> None:
    """Small photos in the folders that documents name; those of ``photos`` have masks."""
    small = cv2.resize(read_photo(demo_photos("scenes")[0])[..., ::-1], (96, 64))
    for name in ("street", "PHOTOS", "DIR", "photos/images"):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            cv2.imwrite(str(folder / name / f"{number}.jpg"), small)
    cv2.imwrite(str(folder / "street.jpg"), small)
    (folder / "photos/masks").mkdir()
    for number in range(2):
        mask = np.full((64, 96), number, np.uint8)
        cv2.imwrite(str(folder / f"photos/masks/{number}.png"), mask)
    (folder / "photos/val.txt").write_text("0\n1\n")
    (folder / "photos/classes.txt").write_text("tree\nroad\n")
    (folder / "classes.txt").write_text("road\nperson\n")
