"""Photos, frames and videos."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

from tools.torture.damage import odd_array, odd_layout, odd_value, spoil_bytes
from tools.torture.target import BUNDLES, Attempt, target
from tools.torture.targets.bundles import CONFIG
from zsseg_rt import Engine, read_photo
from zsseg_rt.stream.source import Source

FORMATS = ("png", "jpeg", "bmp", "webp", "tiff", "gif")
MOST_PIXELS = 64_000_000  # the default, 200 million, lets one photo take over 1 GB
_MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "LA")


def _picture(draw: random.Random) -> bytes:
    noise = np.random.default_rng(draw.getrandbits(32))
    height, width = draw.choice(((8, 8), (1, 1), (37, 53), (1, 400), (64, 2)))
    image = Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))
    stream = io.BytesIO()
    form = draw.choice(FORMATS)
    for mode in (draw.choice(_MODES), "RGB"):
        try:
            image.convert(mode).save(stream, form)
        except (OSError, ValueError, KeyError):  # this format has no such mode
            stream = io.BytesIO()
        else:
            break
    return stream.getvalue()


@target("photos", "PNG, JPEG, BMP, WebP, TIFF and GIF files with damaged bytes", weight=2)
def _photos(folder: Path) -> Attempt:
    def attempt(draw: random.Random) -> None:
        path = folder / f"photo.{draw.choice(FORMATS)}"
        path.write_bytes(spoil_bytes(_picture(draw), draw))
        image = read_photo(path, max_pixels=MOST_PIXELS)
        if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] != 3:
            raise AssertionError(f"read_photo gave {image.dtype} {image.shape}")

    return attempt


@target("frames", "what `Engine.segment` is given: odd arrays, objects and settings")
def _frames(_: Path) -> Attempt:
    engine = Engine(BUNDLES / "dense.zsseg", CONFIG)
    width = engine.bundle.text.embed_dim
    engine.set_classes(["a", "b"], embeddings=np.eye(2, width, dtype=np.float32))

    def attempt(draw: random.Random) -> None:
        frame = odd_array(draw, (draw.choice((0, 1, 9, 300)), draw.choice((1, 40)), 3))
        if draw.random() < 0.7:
            noise = np.random.default_rng(draw.getrandbits(32))
            frame = odd_layout(noise.integers(0, 256, frame.shape, np.uint8), draw)
        value = odd_value(draw) if draw.random() < 0.2 else frame
        settings = {}
        if draw.random() < 0.3:
            settings[draw.choice(("unknown_below", "with_scores", "memory"))] = odd_value(draw)
        seg = engine.segment(value, **settings)
        if seg.labels.shape != frame.shape[:2]:
            raise AssertionError(f"labels {seg.labels.shape} for a frame {frame.shape}")
        seg.present()

    return attempt


@target("videos", "MP4, AVI and MKV files with damaged bytes, read to their end", group="stream")
def _videos(folder: Path) -> Attempt:
    from zsseg_rt.stream.uris import open_sources

    originals = {suffix: _video(folder / f"good.{suffix}") for suffix in ("mp4", "avi", "mkv")}

    def attempt(draw: random.Random) -> None:
        suffix = draw.choice(list(originals))
        path = folder / f"spoilt.{suffix}"
        path.write_bytes(spoil_bytes(originals[suffix], draw))
        (source,) = open_sources(str(path))
        _read_all(source)

    return attempt


class _Reader:
    """Reads on to the end, however much is damaged."""

    def wait(self, seconds: float) -> bool:
        del seconds
        return False

    def count_damaged(self) -> None:
        pass


def _read_all(source: Source) -> None:
    for number, _ in enumerate(source.pictures(_Reader())):
        if number > 400:
            return


def _video(path: Path) -> bytes:
    import av

    noise = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            image = noise.integers(0, 256, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    return path.read_bytes()
