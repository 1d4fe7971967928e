"""Any byte of any file may be another, and any file may end early: a typed error, or a result."""

import io
import json
from dataclasses import dataclass
from random import Random

import cv2
import numpy as np
import pytest

from support.fakes import write_fake_bundle
from zsseg_rt import Bundle
from zsseg_rt.common.files import read_npy
from zsseg_rt.errors import BundleError, ConfigError, DatasetError, SourceError, VocabularyError
from zsseg_rt.evaluation.datasets.files import read_colour_mask, read_mask
from zsseg_rt.export.words import tokenizer_json
from zsseg_rt.integrations.batch import Journal
from zsseg_rt.photos import read_photo
from zsseg_rt.results.visualize import encode_label_png, read_label_png
from zsseg_rt.text.name_lists import read_name_list
from zsseg_rt.text.tokenizer import Tokenizer, tokenizer_document

NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
TOKENS = (b"", b"\xff", b"[", b'"', b"9" * 30, b"-", b"(", b"\\ud800", b"\0", b"\r\n")


def damaged(content, random):
    """The content with up to three places altered, or cut off."""
    altered = bytearray(content)
    if random.random() < 0.2:
        del altered[random.randrange(len(altered)) :]
    for _ in range(random.choice([1, 1, 3])):
        # half of the places are in the first bytes, where headers are
        place = random.randrange(min(len(altered), random.choice([100, len(content)])) + 1)
        new = random.choice([*TOKENS, bytes([random.randrange(256)])])
        altered[place : place + random.choice([0, len(new), 8])] = new
    return bytes(altered)


@dataclass
class Kind:
    """A file: its name, its content, what reads it, and the error that it may raise."""

    name: str
    content: object
    read: object
    error: type[Exception]
    times: int = 100


def npy():
    content = io.BytesIO()
    np.save(content, np.arange(6, dtype=np.float32).reshape(2, 3))
    return content.getvalue()


def photo(suffix, *options):
    return Kind(
        f"photo{suffix}", lambda: cv2.imencode(suffix, NOISE, options)[1].tobytes(),
        lambda path: read_photo(path).shape[2], SourceError, 40,
    )  # fmt: skip


def few_words():
    model = json.loads(tokenizer_json())["model"]
    kept = [token for token, number in model["vocab"].items() if number < 512 + 20]
    tokens = [*kept, "<start_of_text>", "<end_of_text>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return json.dumps(tokenizer_document(vocab, model["merges"][:20])).encode()


def mask(suffix, read):
    def content():
        return cv2.imencode(suffix, NOISE[..., 0])[1].tobytes()

    return Kind(f"mask{suffix}", content, read, DatasetError, 40)


KINDS = {
    "npy": Kind(
        "rows.npy", npy,
        lambda path: read_npy(path.read_bytes(), what="rows.npy", max_bytes=24), ValueError, 2000,
    ),
    "labels": Kind(
        "a.mask.png", lambda: encode_label_png(NOISE[..., 0], NOISE[0]), read_label_png, SourceError
    ),
    "bmp": photo(".bmp"),
    "jpeg": photo(".jpg"),
    "jpeg, progressive": photo(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "png": photo(".png"),
    "tiff": photo(".tif"),
    "tiff, plain": photo(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 1),
    "webp, lossless": photo(".webp"),
    "webp, lossy": photo(".webp", cv2.IMWRITE_WEBP_QUALITY, 50),
    "mask, png": mask(".png", read_mask),
    "mask, tiff": mask(".tif", read_mask),
    "mask, bmp": mask(".bmp", read_colour_mask),
    "manifest": Kind(
        "bundle.json", None, lambda path: Bundle.load(path.parent).verify(), BundleError, 400
    ),
    "tokenizer": Kind(
        "tokenizer.json", few_words,
        lambda path: Tokenizer(path).encode(["a red dog"]), BundleError, 300,
    ),
    "names": Kind(
        "names.txt", lambda: b"0 road\n1 sky, cloud\n2 __ignore__\n",
        lambda path: read_name_list(path, ConfigError, with_ids=True).groups,
        (ConfigError, VocabularyError), 300,
    ),
    "journal": Kind(
        "journal.jsonl", lambda: b'{"record": {"key": "a"}, "sha256": "b"}\n',
        lambda path: Journal(path, "key").read(), (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_it_is_read_or_refused_by_name(name, tmp_path):
    kind, random = KINDS[name], Random(0)
    if kind.content is None:
        path = write_fake_bundle(tmp_path / "fake.zsseg") / kind.name
        content = path.read_bytes()
    else:
        path, content = tmp_path / kind.name, kind.content()
    path.write_bytes(content)
    kind.read(path)
    for _ in range(kind.times):
        path.write_bytes(damaged(content, random))
        try:
            kind.read(path)
        except kind.error as error:
            text = str(error)
            assert path.name in text or path.parent.name in text
            assert "\n" not in text
