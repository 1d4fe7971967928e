"""Photos are measured before they are decoded: a short file cannot ask for gigabytes."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from support.colour_words import COLOUR_WORDS
from support.command_line import run
from support.errors import refused
from support.picture_files import BOMBS, png
from zsseg_rt.errors import SourceError
from zsseg_rt.photos import read_photo
from zsseg_rt.photos.header import MAX_PIXELS, read_header

FORMATS = {
    "bmp": (".bmp", []),
    "jpeg": (".jpg", []),
    "jpeg, progressive": (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    "png": (".png", []),
    "tiff": (".tif", []),
    "tiff, plain": (".tif", [cv2.IMWRITE_TIFF_COMPRESSION, 1]),
    "webp, lossless": (".webp", []),
    "webp, lossy": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 50]),
}
NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def encode(picture, name):
    suffix, options = FORMATS[name]
    return cv2.imencode(suffix, picture, options)[1].tobytes()


@pytest.mark.parametrize("size_hw", [(1, 1), (37, 53), (1, 4097), (1009, 16)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_header_tells_the_size(name, size_hw):
    for channels in ((), (3,)):
        data = encode(np.zeros((*size_hw, *channels), np.uint8), name)
        header = read_header(data)
        assert header.size_hw == size_hw
        assert header.end <= len(data)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(name, tmp_path):
    data, message = BOMBS[name]
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"photo\.png: .*{message}"):
        read_photo(path)


MEASURE = """
import re, sys
from pathlib import Path
import cv2
from zsseg_rt.errors import SourceError
from zsseg_rt.photos import read_photo

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024

before = peak()
try:
    read_photo(Path(sys.argv[1]))
except SourceError:
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("name", ["67 bytes", "part of 1 GB", "20000x20000"])
def test_a_refused_photo_takes_no_memory(name, tmp_path):
    path = tmp_path / "photo.png"
    whole = png(20000, 20000, depth=1, rows=bytes(20000 * 2501)) if name not in BOMBS else b""
    path.write_bytes(whole or BOMBS[name][0])
    call = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 50  # MB; decoding takes 500 to 3900


def test_the_limit_is_an_argument(tmp_path):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), NOISE)
    np.testing.assert_array_equal(read_photo(path, max_pixels=37 * 53), NOISE[..., ::-1])
    with refused(SourceError, None, "1960", "53x37", "1961"):
        read_photo(path, max_pixels=37 * 53 - 1)


def test_a_file_too_long_for_a_photo_is_not_read(tmp_path):
    path = tmp_path / "disk.png"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: nothing on the disk
    with pytest.raises(
        SourceError, match=f"cannot be read: expected at most {8 * MAX_PIXELS} bytes, got {1 << 40}"
    ):
        read_photo(path)


def test_a_large_photo_fails_alone(colour_bundle, tmp_path, capsys):
    for name, width in (("large", 60), ("small", 20)):
        picture = np.full((30, width, 3), COLOUR_WORDS["red"][::-1], np.uint8)
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture)
    out = tmp_path / "out"
    code = run("segment", tmp_path, "-b", colour_bundle, "--class", "red", "--out", out,
               "--max-pixels", 1000)  # fmt: skip
    assert code == 1
    printed = capsys.readouterr().out.replace("\n", "")
    assert "large.png: expected at most 1000 pixels, got 60x30 = 1800" in printed
    assert sorted(path.name for path in out.glob("*.png")) == [
        "small.mask.png",
        "small.overlay.png",
    ]
