"""Labels of many photos as files for other programs: COCO, GeoJSON, labelme."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zsseg_rt.common.checks import check_choice
from zsseg_rt.common.schema import json_text
from zsseg_rt.integrations.batch.journal import PhotoResult
from zsseg_rt.photos import MASK_SUFFIX
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import read_label_png, save_file

KINDS = ("coco", "geojson", "labelme")
COCO_FILE = "coco.json"
_TOLERANCE = 1.5  # pixels, of labelme's outlines, which are meant to be corrected by hand


class AnnotationFiles:
    """Writes ``STEM.geojson`` or labelme's ``STEM.json`` per photo, or one ``coco.json`` for all.

    Args:
        kind: One of :data:`KINDS`.
        out_dir: Where the photos' label images are.
        names: The classes.
    """

    def __init__(self, kind: str, out_dir: Path, names: Sequence[str]) -> None:
        check_choice("kind", kind, KINDS)
        self._kind, self._out_dir, self._names = kind, out_dir, tuple(names)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, result: PhotoResult, seg: Segmentation | None) -> Path | None:
        """Take a photo's labels; those of one that was done earlier are read from its label image.

        Returns:
            The file that was written for this photo alone, if any.
        """
        if result.mask is None:
            return None
        if seg is None:
            labels = read_label_png(result.mask)
            seg = Segmentation(labels=labels, names=self._names, vocabulary_version=0)
        stem = Path(result.mask.removesuffix(MASK_SUFFIX))
        if self._kind == "coco":
            self._add_to_coco(result.photo, seg)
            return None
        if self._kind == "geojson":
            path, content = stem.with_name(f"{stem.name}.geojson"), seg.to_geojson()
        else:
            path = stem.with_name(f"{stem.name}.json")
            photo = os.path.relpath(result.photo, path.parent)
            content = seg.to_labelme(photo, tolerance=_TOLERANCE)
        _write(path, content)
        return path

    def finish(self) -> Path | None:
        """Write what belongs to all photos together; returns its path, if any."""
        if self._kind != "coco":
            return None
        path = self._out_dir / COCO_FILE
        categories = [{"id": number, "name": name} for number, name in enumerate(self._names, 1)]
        photos = [Path(image["file_name"]).absolute() for image in self._images]
        folder = os.path.commonpath([photo.parent for photo in photos]) if photos else ""
        for image, photo in zip(self._images, photos, strict=True):
            image["file_name"] = photo.relative_to(folder).as_posix()
        content = {"info": {}, "licenses": [], "categories": categories}
        _write(path, content | {"images": self._images, "annotations": self._annotations})
        return path

    def _add_to_coco(self, photo: str, seg: Segmentation) -> None:
        number, (height, width) = len(self._images) + 1, seg.labels.shape
        image = {"id": number, "file_name": photo, "width": width, "height": height}
        self._images.append(image)
        for annotation in seg.to_coco_rle(image_id=number):
            self._annotations.append({**annotation, "id": len(self._annotations) + 1})


def _write(path: Path, content: Any) -> None:
    save_file(path, (json_text(content) + "\n").encode())
