"""HEIC and AVIF photos are read where a package decodes them, and otherwise told of."""

import importlib.util
import io
import logging

import numpy as np
import pytest

from support.colour_words import COLOUR_WORDS
from support.command_line import run
from support.errors import refused
from zsseg_rt.errors import SourceError
from zsseg_rt.photos import find_photos, read_header, read_photo

Image = pytest.importorskip("PIL.Image")
features = pytest.importorskip("PIL.features")

has_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
has_heif = pytest.mark.skipif(
    importlib.util.find_spec("pillow_heif") is None, reason="needs pip install '.[heif]'"
)
FORMATS = [pytest.param("AVIF", marks=has_avif), pytest.param("HEIF", marks=has_heif)]


def encoded(format_, picture, **options):
    if format_ == "HEIF":
        import pillow_heif

        pillow_heif.register_heif_opener()
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format_, quality=95, **options)
    return content.getvalue()


def red(height=24, width=40):
    picture = np.full((height, width, 3), COLOUR_WORDS["red"], np.uint8)
    picture[:, width // 2 :] //= 2
    return picture


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("size_hw", [(24, 40), (601, 1003)])
def test_header_and_pixels(format_, size_hw, tmp_path):
    picture = red(*size_hw)
    data = encoded(format_, picture)
    for told, true in zip(read_header(data).size_hw, size_hw, strict=True):
        assert true <= told <= max(64, true + 1)  # HEVC's blocks, before they are cropped
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    decoded = read_photo(path)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - picture).mean() < 8  # lossy


@pytest.mark.parametrize("format_", FORMATS)
def test_orientation_is_applied(format_, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90 degrees clockwise
    (tmp_path / "a.avif").write_bytes(encoded(format_, red(24, 40), exif=exif.tobytes()))
    decoded = read_photo(tmp_path / "a.avif")
    assert decoded.shape == (40, 24, 3)
    assert decoded[:20].mean() > decoded[20:].mean()


@has_avif
def test_a_folder_s_avif_photos_are_labelled(tmp_path, colour_bundle, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "phone.AVIF").write_bytes(encoded("AVIF", red()))
    call = ("segment", tmp_path / "in", "-b", colour_bundle, "--classes", "red,blue")
    assert run(*call, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "phone.mask.png").is_file()


@has_avif
def test_too_many_pixels_are_not_decoded(tmp_path):
    (tmp_path / "a.avif").write_bytes(encoded("AVIF", red()))
    with refused(SourceError, None, "100", "40x24"):
        read_photo(tmp_path / "a.avif", max_pixels=100)


@has_avif
@pytest.mark.parametrize("length", [12, 60, 200, 300])
def test_cut_files_are_refused(length, tmp_path):
    (tmp_path / "a.avif").write_bytes(encoded("AVIF", red())[:length])
    with refused(SourceError, None, "a.avif"):
        read_photo(tmp_path / "a.avif")


def test_what_cannot_be_read_is_counted_and_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    for name in ("a.png", "b.HEIC", "c.heif", "d.avif", "e.gif", "notes.txt"):
        (tmp_path / name).write_bytes(b"any")
    with caplog.at_level(logging.WARNING):
        assert find_photos([str(tmp_path)]) == [tmp_path / "a.png"]
    (record,) = caplog.records
    message = record.getMessage()
    assert "4 pictures cannot be read and are skipped: b.HEIC, c.heif, d.avif, ..." in message
    assert "pip install '.[heif]'" in message
    assert "notes" not in message


@has_avif
def test_without_a_decoder_the_photo_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.avif").write_bytes(encoded("AVIF", red()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with refused(SourceError, None, "'.[heif]'"):
        read_photo(tmp_path / "a.avif")
