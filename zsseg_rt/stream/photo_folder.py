"""Photos as a stream: a file, a folder or a pattern, one picture after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from dataclasses import dataclass

from zsseg_rt.errors import SourceError
from zsseg_rt.photos import find_photos, read_photo
from zsseg_rt.stream.source import Picture, Reader

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PhotoSource:
    """Shows photos in order, one per second of the stream's own time.

    Attributes:
        name: What it is called.
        path: A file, folder or glob pattern; see :func:`zsseg_rt.photos.find_photos`.
        channel_order: Of the frames.
    """

    name: str
    path: str
    channel_order: str = "rgb"
    live = False

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        """Read the photos; those that cannot be read are left out."""
        photos = find_photos([self.path])
        found = 0
        for path in photos:
            try:
                image = read_photo(path)
            except SourceError as exc:
                if len(photos) == 1:
                    raise
                _log.warning("%s; it is skipped", exc)
                reader.count_damaged()
                continue
            if self.channel_order == "bgr":
                image = image[..., ::-1].copy()
            yield Picture(
                image=image, captured_at=time.monotonic(), clock="file", pts_seconds=float(found)
            )
            found += 1
        if not found:
            raise SourceError(f"{self.name}: expected photos, {len(photos)} cannot be read")
