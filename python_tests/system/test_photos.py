"""Photos are measured before they are decoded, and read as they are meant, in every version."""

import importlib.util
import io
import logging
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from support.command_line import memory_of_refusal, run_with_other
from support.errors import refused
from support.picture_files import BOMBS, png, png_part, tiff_of
from zsseg_rt.errors import DatasetError, SourceError
from zsseg_rt.evaluation.datasets.files import read_picture
from zsseg_rt.photos import MAX_PIXELS, decode_photo, find_photos, read_header, read_photo
from zsseg_rt.stream.photo_folder import PhotoSource


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(name, tmp_path):
    data, message = BOMBS[name]
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"photo\.png: .*{message}"):
        read_photo(path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("name", ["67 bytes", "20000x20000"])
def test_a_refused_photo_takes_no_memory(name, tmp_path):
    path, whole = tmp_path / "photo.png", bytes(20000 * 2501)
    data = BOMBS[name][0] if name in BOMBS else png(20000, 20000, depth=1, rows=whole)
    path.write_bytes(data)
    setup = "import cv2; from zsseg_rt.photos import read_photo"
    megabytes, _ = memory_of_refusal(setup, "read_photo(Path(sys.argv[1]))", path)
    assert megabytes < 50  # decoding takes 500 to 3900


def test_the_limit_is_an_argument(tmp_path):
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    cv2.imwrite(str(path), noise)
    np.testing.assert_array_equal(read_photo(path, max_pixels=37 * 53), noise[..., ::-1])
    with refused(SourceError, None, "1960", "53x37", "1961"):
        read_photo(path, max_pixels=37 * 53 - 1)
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse: nothing on the disk
    with refused(SourceError, None, str(8 * MAX_PIXELS), str(1 << 40)):
        read_photo(path)


PHOTO = Path("in/photo")
RGB = np.empty((48, 64, 3), np.uint8)
RGB[:, :32], RGB[:, 32:], RGB[:9] = (250, 20, 30), (10, 40, 200), (30, 220, 40)
WIDE = RGB.astype(np.uint16) * 257
GREY = RGB[..., :1]
CLEAR = np.full_like(GREY, 128)
RGBA, WIDE_RGBA = np.dstack([RGB, CLEAR]), np.dstack([WIDE, CLEAR.astype(np.uint16) * 257])


def png_of(samples, stated=None):
    """Samples in RGB as PNG, whose sBIT states how many bits count."""
    data = cv2.imencode(".png", samples[..., ::-1])[1].tobytes()
    own = b"" if stated is None else png_part(b"sBIT" + bytes([stated] * samples.shape[2]))
    return data[:33] + own + data[33:]


ROWS = RGB[::-1, :, ::-1].tobytes()
OLD_BMP = struct.pack("<IIIIHHHH", 26 + len(ROWS), 0, 26, 12, 64, 48, 1, 24)
READ = {
    "bmp of the oldest kind": (b"BM" + OLD_BMP + ROWS, RGB),
    "rgb": (tiff_of(RGB, 2), RGB),
    "three bands": (tiff_of(RGB, 1, _338=[0, 0]), RGB),
    "three bands of 16 bits": (tiff_of(WIDE, 1, _338=[0, 0]), RGB),
    "three bands in planes": (tiff_of(RGB, 1, planes=True), RGB),
    "16 bits in tiles": (tiff_of(WIDE, 2, tile=32, zipped=True), RGB),
    "bigtiff of 16 bits": (tiff_of(WIDE, 2, big=True), RGB),
    "bigtiff in planes": (tiff_of(RGB, 1, big=True, planes=True, order=">"), RGB),
    "other byte order": (tiff_of(WIDE, 2, order=">"), RGB),
    "alpha darkens nothing": (tiff_of(RGBA, 2, _338=[2]), RGB),
    "alpha of 16 bits": (tiff_of(WIDE_RGBA, 2, _338=[2]), RGB),
    "alpha in planes": (tiff_of(RGBA, 2, _338=[2], planes=True), RGB),
    "a fourth band": (tiff_of(WIDE_RGBA, 2, _338=[0]), RGB),
    "12 bits": (tiff_of(WIDE >> 4, 2), RGB),
    "14 bits": (tiff_of(WIDE >> 2, 1), RGB),
    "stated to be 14 bits": (tiff_of((WIDE >> 4), 2, _281=[16383] * 3), RGB >> 2),
    "grey of 12 bits": (tiff_of(GREY.astype(np.uint16) << 4, 1), GREY),
    "white is zero": (tiff_of(255 - GREY, 0), GREY),
    "white is zero in 16 bits": (tiff_of(65535 - WIDE[..., :1], 0), GREY),
    "grey with alpha": (tiff_of(np.dstack([GREY, CLEAR]), 1, _338=[2]), GREY),
    "cmyk": (tiff_of(np.dstack([255 - RGB, 0 * GREY]), 5), RGB),
    "png of 10 bits": (png_of(WIDE >> 6), RGB),
    "png of 12 bits": (png_of(WIDE >> 4), RGB),
    "png of 8 bits in 16": (png_of(RGB.astype(np.uint16)), RGB),
    "png stated to be 14 bits": (png_of(WIDE >> 4, 14), RGB >> 2),
    "png of 12 bits, scaled as PNG asks": (png_of(WIDE & 0xFFF0, 12), RGB),
    "dark png of 16 bits": (png_of(WIDE >> 4, 16), RGB >> 4),
    "black png of 16 bits": (png_of(WIDE * 0), RGB * 0),
    "png with alpha": (cv2.imencode(".png", RGBA[..., [2, 1, 0, 3]])[1].tobytes(), RGB),
}  # fmt: skip
REFUSED = {
    "16 bits in planes": tiff_of(WIDE, 2, planes=True),
    "floats": tiff_of(RGB.astype(np.float32) / 255, 2),
    "grey floats": tiff_of(GREY.astype(np.float32), 1),
    "with a sign": tiff_of(GREY.astype(np.int16), 1),
    "32 bits": tiff_of(GREY.astype(np.uint32), 1),
    "two bands": tiff_of(np.dstack([GREY, CLEAR]), 1, _338=[0]),
    "four bands": tiff_of(WIDE_RGBA, 1, _338=[0, 0, 0]),
    "lab": tiff_of(RGB, 8),
    "five bands": tiff_of(np.dstack([WIDE_RGBA, WIDE[..., :1]]), 2, _338=[0, 0]),
    "cmyk of 16 bits": tiff_of(WIDE_RGBA, 5),
    "a camera's raw samples": tiff_of(WIDE[..., :1], 32803),
    "channels of several sizes": tiff_of(RGB, 2, _258=[8, 8, 16]),
}


@pytest.mark.parametrize("row", READ)
def test_samples_are_read_as_they_are_meant(row):
    data, expected = READ[row]
    image = decode_photo(data, PHOTO)
    assert np.abs(image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("row", REFUSED)
def test_samples_of_other_kinds_are_refused(row):
    with refused(SourceError, None, str(PHOTO), "TIFF"):
        decode_photo(REFUSED[row], PHOTO)


def test_fewer_bits_are_told_once_a_folder(tmp_path, caplog):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png_of(WIDE >> 4))
        with caplog.at_level(logging.WARNING):
            read_photo(tmp_path / name)
    (record,) = caplog.records
    assert f"{tmp_path / 'a.png'}: 16-bit samples hold 12 bits" in record.getMessage()


@pytest.mark.parametrize("row", ["three bands of 16 bits", "png of 12 bits"])
def test_every_door_shows_the_same_colours(row, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(READ[row][0])
    image = read_photo(path)
    np.testing.assert_array_equal(read_picture(path), image)
    frames = PhotoSource(name="a", path=str(path)).pictures(None)
    np.testing.assert_array_equal(next(iter(frames)).image, image)


TURNS = {
    1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
    6: np.rot90(RGB, -1), 7: RGB.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(RGB), 9: RGB,
}  # fmt: skip


def saved(image, kind, orientation=None, **options):
    """A file with the camera's orientation in its EXIF data."""
    content, about = io.BytesIO(), Image.Exif()
    about[274] = orientation
    own = {} if orientation is None else {"exif": about.tobytes()}
    Image.fromarray(image).save(content, kind, **own, **options)
    return content.getvalue()


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF", "16 bits", "planes"])
def test_orientation_is_applied(kind, orientation):
    if kind.isupper() and kind != "TIFF":
        data = saved(RGB, kind, orientation, quality=98)
    else:
        samples = WIDE if kind == "16 bits" else RGB
        data = tiff_of(samples, 2, _274=[orientation], planes=kind == "planes")
    image = decode_photo(data, PHOTO)
    assert image.shape == TURNS[orientation].shape
    assert np.abs(image.astype(int) - TURNS[orientation]).mean() < 5


SMOOTH = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8), (320, 240))
ENDING = {
    "jpeg": (".jpg", []),
    "progressive jpeg": (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    "jpeg with restarts": (".jpg", [cv2.IMWRITE_JPEG_RST_INTERVAL, 3]),
    "png": (".png", []),
    "webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 80]),
    "webp, lossless": (".webp", []),
    "bmp": (".bmp", []),
    "tiff": (".tif", [cv2.IMWRITE_TIFF_COMPRESSION, 1]),
    "packed tiff": (".tif", []),
}
TAILS = (b"\xff", bytes(999), b"\0\0\0\x18ftypmp42 a phone's film", b"\xff\xd8\xff\xe0 a preview")


@pytest.mark.parametrize("kind", ENDING)
def test_a_file_ends_at_its_own_end(kind):
    suffix, options = ENDING[kind]
    for size_hw in ((1, 1), (1, 4097), (1009, 16), (37, 53)):
        small = cv2.imencode(suffix, np.zeros((*size_hw, 3), np.uint8), options)[1].tobytes()
        assert read_header(small).size_hw == size_hw
    data = cv2.imencode(suffix, SMOOTH, options)[1].tobytes()
    whole = decode_photo(data, PHOTO)
    for tail in TAILS:
        np.testing.assert_array_equal(decode_photo(data + tail, PHOTO), whole)
    for share in (0.3, 0.6, 0.9, 0.99):
        with refused(SourceError, None, str(PHOTO)):
            decode_photo(data[: int(len(data) * share)], PHOTO)


def test_a_tiff_whose_tags_come_first_ends_with_its_pixels():
    with refused(SourceError, None, "TIFF", "320x240"):
        decode_photo(saved(SMOOTH, "TIFF")[:-50], PHOTO)


@pytest.mark.parametrize("filled", [bytes, lambda size: b"\xff" * size])
def test_half_a_jpeg_in_a_whole_file_is_refused(filled, tmp_path):
    data = cv2.imencode(".jpg", SMOOTH)[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(data[:3000] + filled(len(data) - 3000))
    for read, error in ((read_photo, SourceError), (read_picture, DatasetError)):
        with refused(error, None, "JPEG", "320x240"):
            read(tmp_path / "a.jpg")


def test_ordinary_suffixes_are_photos_and_what_cannot_be_read_is_told(
    tmp_path, monkeypatch, caplog
):
    names = ["a.JPE", "b.jfif", "c.Jpeg", "d.DIB", "e.TIFF", "f.pjpeg", "g.webp"]
    for name in (*names, "b.HEIC", "c.heif", "d.avif", "e.gif", "notes.txt"):
        (tmp_path / name).write_bytes(b"any")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in find_photos([str(tmp_path)])] == names
    (record,) = caplog.records
    message = record.getMessage()
    assert "4 pictures cannot be read and are skipped: b.HEIC, c.heif, d.avif, ..." in message
    assert "pip install '.[heif]'" in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package == "PIL" or None)
    monkeypatch.setitem(sys.modules, "PIL", object())  # broken: reading a photo says so
    assert "d.avif" in [path.name for path in find_photos([str(tmp_path)])]


@pytest.mark.parametrize(
    ("format_", "module"), [("AVIF", "PIL.AvifImagePlugin"), ("HEIF", "pillow_heif")]
)
def test_heic_and_avif_are_read_where_a_package_decodes(format_, module, tmp_path, monkeypatch):
    decoder = pytest.importorskip(module, reason="needs Pillow 11.3, pip install '.[heif]'")
    if format_ == "HEIF":
        decoder.register_heif_opener()
    for orientation, expected in ((None, SMOOTH), (6, np.rot90(SMOOTH, -1))):
        data = saved(SMOOTH, format_, orientation, quality=95)
        image = decode_photo(data, PHOTO)
        assert image.shape == expected.shape
        assert np.abs(image.astype(int) - expected).mean() < 8
    (tmp_path / f"phone.{format_}").write_bytes(data)
    assert find_photos([str(tmp_path)]) == [tmp_path / f"phone.{format_}"]
    with refused(SourceError, None, "100", "320x240"):
        decode_photo(data, PHOTO, max_pixels=100)
    for length in (12, 60, 200, 300):
        with refused(SourceError, None, str(PHOTO)):
            decode_photo(data[:length], PHOTO)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with refused(SourceError, None, "'.[heif]'"):
        decode_photo(data, PHOTO)


def test_all_of_this_with_opencv_4():
    run_with_other("ZSSEG_OPENCV_4", "cv2", "4", __file__, skipped="opencv_4")
