"""Odd photos, names and options: each is right, or refused in one line that names it."""

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.colour_words import COLOUR_WORDS
from support.command_line import run
from zsseg_rt.demo import demo_bundle

Image = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 24, 40  # of pictures: red on the left, blue on the right, if not said otherwise


def halves(left: str, right: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture of two colours, uint8 RGB [height, width, 3]."""
    image = np.empty((height, width, 3), np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = COLOUR_WORDS[left], COLOUR_WORDS[right]
    return image


def saved(kind, mode="RGB", *, pixels=None, **options) -> bytes:
    image = Image.fromarray(halves("red", "blue") if pixels is None else pixels)
    content = io.BytesIO()
    image.convert(mode).save(content, kind, **options)
    return content.getvalue()


def frames(kind: str) -> bytes:
    """Two pictures in one file, of which the second is green."""
    first = Image.fromarray(halves("red", "blue"))
    second = Image.fromarray(halves("green", "green"))
    content = io.BytesIO()
    first.save(content, kind, save_all=True, append_images=[second], duration=100, lossless=True)
    return content.getvalue()


def thumbnailed(data: bytes) -> bytes:
    """A JPEG that holds another, whole one in its EXIF segment, as cameras' files do."""
    inner = b"Exif\0\0" + saved("JPEG", pixels=halves("red", "blue", 8, 8))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 2) + inner + data[2:]


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def strip(height: int, width: int, *colours: str) -> bytes:
    return saved("PNG", pixels=halves(*colours, height, width))


PNG = saved("PNG")
JPEG = saved("JPEG", quality=95)
LARGE = halves("red", "blue", 300, 300)
CLASSES = ("red", "blue", "white", "black", "green")
COLOURED, GREY = ("red", "blue"), ("white", "black")
DEFAULTS = (COLOURED, (HEIGHT, WIDTH))

# A file's name and content, then its colours and size; or what its refusal says.
PHOTOS = {
    "png with a palette": ("p.png", saved("PNG", "P")),
    "grey png with alpha": ("la.png", saved("PNG", "LA", pixels=halves(*GREY)), GREY),
    "animated png": ("moving.png", frames("PNG")),
    "cmyk jpeg": ("cmyk.jpg", saved("JPEG", "CMYK", quality=95)),
    "jpeg with a thumbnail": ("thumb.jpg", thumbnailed(JPEG)),
    "webp with alpha": ("alpha.webp", saved("WEBP", "RGBA", lossless=True)),
    "animated webp": ("moving.webp", frames("WEBP")),
    "tiff of several pages": ("pages.tif", frames("TIFF")),
    "bmp with a palette": ("p.bmp", saved("BMP", "P")),
    "1x1": ("dot.png", strip(1, 1, "blue", "blue"), ("blue",), (1, 1)),
    "1x5000": ("line.png", strip(1, 5000, *COLOURED), COLOURED, (1, 5000)),
    "20000x2": ("pole.png", strip(20000, 2, *COLOURED), COLOURED, (20000, 2)),
    "cut png": ("cut.png", saved("PNG", pixels=LARGE)[:-300], "image file"),
    "text": ("text.jpg", b"no picture, " * 30, "in no known image format"),
    "reading fails": ("mem.png", link_to("/proc/self/mem"), "cannot be read: Input/output"),
    "link": ("link.png", link_to("p.bmp")),
    "jpeg called png": ("jpeg.png", JPEG),
    "upper case": ("LOUD.PNG", PNG),
    "space and quotes": ("a b'\"c .png", PNG),
    "escape and line break": ("\x1b[31m\nred.png", PNG),
    "emoji and right to left": ("\U0001f469\u200d\U0001f680كلب.png", PNG),
    "not utf-8": (os.fsdecode(b"caf\xe9.png"), PNG),
    "leading dash": ("--out.png", PNG),
    "percent and brackets": ("100%s%d[red]*?.png", PNG),
    "longest name": ("x" * 251 + ".png", PNG, "cannot be written: File name too long"),
}

NO_PHOTOS = {
    "hidden": (".a.png", PNG),
    "apple double": ("._a.jpg", b"\0\5\x16\7"),
    "folder": ("folder.jpg", Path.mkdir),
    "pipe": ("pipe.png", os.mkfifo),
    "link in a circle": ("loop.png", link_to("loop.png")),
    "link to nothing": ("gone.png", link_to("nowhere.png")),
}


@pytest.fixture(scope="module")
def outcome(colour_bundle, tmp_path_factory):
    """Every photo above in one folder, labelled by one command: its exit code and its report."""
    base = tmp_path_factory.mktemp("odd")
    folder = base / "in"
    folder.mkdir()
    for name, data, *_ in (*PHOTOS.values(), *NO_PHOTOS.values()):
        data(folder / name) if callable(data) else (folder / name).write_bytes(data)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ZSSEG_HOME", str(base / "home"))
        code = run("segment", folder, "-b", colour_bundle, "--classes", ",".join(CLASSES),
                   "-o", base / "out", "--json", base / "r.json", "--lanes", 1)  # fmt: skip
    photos = json.loads((base / "r.json").read_text(encoding="utf-8", errors="surrogateescape"))
    return code, folder, {Path(entry["photo"]).name: entry for entry in photos["photos"]}


@pytest.mark.parametrize("row", PHOTOS)
def test_a_photo_is_right_or_refused_in_one_line(row, outcome):
    name, _, expected, size_hw = (*PHOTOS[row], *DEFAULTS[len(PHOTOS[row]) - 2 :])
    _, folder, results = outcome
    result = results[name]
    if isinstance(expected, str):
        assert expected in result["error"]
        assert result["error"].count("\n") == 0
        assert name.partition(".")[0] in result["error"]
        return
    assert result["error"] is None
    assert tuple(result["size_hw"]) == size_hw
    shares = {entry["name"]: entry["share"] for entry in result["classes"]}
    for colour in expected:
        assert shares[colour] == pytest.approx(1 / len(expected), abs=0.05)
    assert (folder.parent / "out" / Path(result["mask"]).name).is_file()


@pytest.mark.parametrize("row", NO_PHOTOS)
def test_what_is_no_photo_is_left_out(row, outcome):
    code, _, results = outcome
    assert code == 1  # some photos failed
    assert NO_PHOTOS[row][0] not in results
    assert len(results) == len(PHOTOS)


ARGUMENTS = {
    "only separators": (["--classes", " ; ,;"], 2, "name at least one class"),
    "an empty name": (["--class", " "], 1, "--classes[0]: expected a name, got an empty string"),
    "twice": (["--classes", "blue ball,blue ball"], 1, "every name once, also apart from case"),
    "unknown words": (["--classes", "自転車"], 1, "自転車"),
    "very long": (["--class", "ball" * 3000], 1, "ball"),
    "a file of nothing": (["--classes", "@empty.txt"], 1, "empty.txt: expected one class name"),
    "no file after @": (["--classes", "@"], 2, "--classes: expected a file's name after @"),
    "a folder after @": (["--classes", "@/"], 1, "/: expected a text file"),
    "classes twice": (["--classes", "ball", "--classes=sky"], 2, "--classes: expected it once"),
    "no number": (["--class", "ball", "--alpha", "nan"], 2, "--alpha"),
    "a template of nothing": (["--class", "ball", "--template", "no"], 1, "--template: expected"),
    "no place for json": (["--class", "ball", "--json", ""], 2, "--json: expected a file"),
    "a link in a circle": (["loop.png", "--class", "ball"], 1, "loop.png: expected a photo"),
    "a pipe": (["pipe.png", "--class", "ball"], 1, "pipe.png: expected a photo"),
    "a folder called jpg": (["dir.jpg", "--class", "ball"], 1, "dir.jpg: expected photos"),
    "escapes": (["\x1b[31m\n.png", "--class", "ball"], 1, r"\x1b[31m .png: expected a photo"),
    "an option for a photo": (["-photo.png", "--class", "ball"], 2, "-p"),
    "options twice, and before photos": (
        ["--classes", "@wide.txt", "--device", "x", "--device", "cpu", "--", "--out.png"], 0, "",
    ),
}  # fmt: skip


@pytest.fixture
def odd_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    Path("empty.txt").write_text("\n\n# nothing\n", encoding="utf-8")
    Path("wide.txt").write_text("ball\n", encoding="utf-16")
    Path("loop.png").symlink_to("loop.png")
    Path("dir.jpg").mkdir()
    os.mkfifo("pipe.png")
    for name in ("photo.png", "--out.png"):
        Path(name).write_bytes(PNG)


@pytest.mark.parametrize("row", ARGUMENTS)
def test_arguments_are_right_or_refused_in_one_line(row, odd_files, capsys):
    arguments, code, message = ARGUMENTS[row]
    named = [word for word in arguments if word.endswith((".png", ".jpg"))]
    photo = [] if named else ["photo.png"]
    assert run("segment", "-b", demo_bundle("scenes"), *photo, *arguments) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if code == 0:
        assert "zsseg-rt: " not in error
    else:
        assert error.count("\n") == 1
        assert error.startswith("zsseg-rt: ")
        assert message in error


def test_libraries_add_nothing_to_the_one_line(colour_bundle, tmp_path, capfd):
    photo = tmp_path / "cut.png"
    photo.write_bytes(PHOTOS["cut png"][1])
    assert run("segment", photo, "-b", colour_bundle, "--class", "red", "-o", tmp_path / "out") == 1
    assert capfd.readouterr().err.strip() == "zsseg-rt: 1 of 1 photos failed; see above"
