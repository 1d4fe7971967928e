"""Label the photos of a Hugging Face data set: ``python hugging_face.py FOLDER OUT``.

Needs ``pip install datasets``. Writes FOLDER's photos (a folder as ``imagefolder`` reads it) with
columns ``mask`` (an image of labels), ``classes``, ``unknown_share`` and ``error`` to OUT. ``map``
takes cached results only if the bundle's content, the names and the package's version are the same.
"""

import hashlib
import io
from argparse import ArgumentParser
from pathlib import Path

parser = ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("out")
arguments = parser.parse_args()  # --help works without the packages

import datasets
from PIL import Image

from zsseg_rt import Bundle, Engine, SourceError, __version__
from zsseg_rt.demo import demo_classes
from zsseg_rt.photos import decode_photo

CLASS = {"name": datasets.Value("string"), "pixels": datasets.Value("int64")}
NEW = {
    "mask": datasets.Image(),
    "classes": [CLASS],
    "unknown_share": datasets.Value("float64"),
    "error": datasets.Value("string"),
}


class Labeller:
    """A function for ``Dataset.map(..., batched=True)``; each process makes an engine."""

    def __init__(self, bundle: Path, names: list) -> None:
        manifest = (bundle / "bundle.json").read_bytes()
        self.made_of = (hashlib.sha256(manifest).hexdigest(), names, __version__)
        self.bundle, self.names, self.engine = bundle, names, None

    def __getstate__(self) -> dict:
        """What ``map`` hashes and sends to other processes: no engine."""
        return self.__dict__ | {"engine": None}

    def __call__(self, batch: dict) -> dict:
        """Add the new columns to a batch of photos that are not decoded."""
        if self.engine is None:
            self.engine = Engine(self.bundle)
            self.engine.set_classes(self.names, background="auto")
        rows = [self.label(photo) for photo in batch["image"]]
        return {name: [row.get(name) for row in rows] for name in NEW}

    def label(self, photo: dict) -> dict:
        """One photo's new columns; one that cannot be read has an error alone."""
        name = photo["path"] or "a photo"
        try:
            content = photo["bytes"] or Path(name).read_bytes()
            seg = self.engine.segment(decode_photo(content, Path(name)))
        except (OSError, SourceError) as error:
            return {"error": str(error)}
        file = io.BytesIO()
        Image.fromarray(seg.labels).save(file, "PNG")
        classes = [{"name": share.name, "pixels": share.pixels} for share in seg.present()]
        unknown = float((seg.labels == seg.unknown).mean())
        mask = {"bytes": file.getvalue(), "path": None}
        return {"mask": mask, "classes": classes, "unknown_share": unknown}


if __name__ == "__main__":
    photos = datasets.load_dataset("imagefolder", data_dir=arguments.folder, split="train")
    photos = photos.cast_column("image", datasets.Image(decode=False))  # here damage is a row's
    features = datasets.Features({**photos.features, **NEW})
    labeller = Labeller(Bundle.demo().path, demo_classes())
    photos.map(labeller, batched=True, batch_size=16, features=features).save_to_disk(arguments.out)
