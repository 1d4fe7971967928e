"""Pictures and masks of a data set that claim too much, or are damaged: one kind of error."""

import io
import re

import numpy as np
import pytest

from support.picture_files import BOMBS
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets.files import read_colour_mask, read_mask, read_picture

Image = pytest.importorskip("PIL.Image")

READERS = {reader.__name__: reader for reader in (read_picture, read_mask, read_colour_mask)}
GREY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8))
KINDS = {
    "png": (GREY, "PNG", {}),
    "png, palette": (GREY.convert("P"), "PNG", {}),
    "tiff": (GREY, "TIFF", {}),
    "tiff, packed": (GREY, "TIFF", {"compression": "tiff_lzw"}),
    "bmp": (GREY, "BMP", {}),
    "webp": (GREY.convert("RGB"), "WEBP", {"lossless": True}),
    "jpeg": (GREY.convert("RGB"), "JPEG", {}),
}


def encode(image, format_, options):
    content = io.BytesIO()
    image.save(content, format_, **options)
    return content.getvalue()


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


@pytest.mark.parametrize("name", ["67 bytes", "below the limit", "bmp", "tiff", "gif"])
def test_bombs_are_refused_by_their_header(name, read, tmp_path):
    data, message = BOMBS[name]
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"a\.png: .*{message}"):
        read(path)


def test_a_mask_between_the_two_limits_is_refused(tmp_path):
    """Pillow has a limit of its own, below ours."""
    data, side = bytearray(encode(GREY.convert("RGB"), "WEBP", {"lossless": True})), 13799
    data[21:25] = (side | side << 14).to_bytes(4, "little")
    path = tmp_path / "a.webp"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=re.escape(str(path))):
        read_colour_mask(path)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_a_dataset_error(kind, read, tmp_path):
    rng, data, path = np.random.default_rng(1), encode(*KINDS[kind]), tmp_path / "a"
    for _ in range(40):
        damaged = bytearray(data[: rng.integers(1, len(data)) if rng.random() < 0.3 else None])
        for place in rng.integers(0, min(len(damaged), 90), 3):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            assert read(path).size
        except DatasetError as error:
            assert str(path) in str(error)  # noqa: PT017 - both outcomes are right
