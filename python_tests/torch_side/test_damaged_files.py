"""Damaged files are a typed error or a result, and damaged caches are made again."""

import io
import json
import logging
import os
import shutil
from dataclasses import dataclass
from random import Random

import cv2
import numpy as np
import pytest

from support.fakes import write_fake_bundle
from support.graphs import write_scale
from support.rtx_plans import PLAN_KEY
from zsseg_rt import Bundle
from zsseg_rt.backends._openvino import BACKEND
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.plan_cache import Plan, PlanCache
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


def photo(suffix):
    return Kind(
        f"photo{suffix}", lambda: cv2.imencode(suffix, NOISE)[1].tobytes(),
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
        lambda path: read_npy(path.read_bytes(), what="rows.npy", max_bytes=24), ValueError, 400,
    ),
    "labels": Kind(
        "a.mask.png", lambda: encode_label_png(NOISE[..., 0], NOISE[0]), read_label_png, SourceError
    ),
    "bmp": photo(".bmp"),
    "jpeg": photo(".jpg"),
    "png": photo(".png"),
    "tiff": photo(".tif"),
    "webp": photo(".webp"),
    "mask, png": mask(".png", read_mask),
    "mask, tiff": mask(".tif", read_mask),
    "mask, bmp": mask(".bmp", read_colour_mask),
    "manifest": Kind(
        "bundle.json", None, lambda path: Bundle.load(path.parent).verify(), BundleError, 150
    ),
    "tokenizer": Kind(
        "tokenizer.json", few_words,
        lambda path: Tokenizer(path).encode(["a red dog"]), BundleError, 100,
    ),
    "names": Kind(
        "names.txt", lambda: b"0 road\n1 sky, cloud\n2 __ignore__\n",
        lambda path: read_name_list(path, ConfigError, with_ids=True).groups,
        (ConfigError, VocabularyError), 100,
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


# --- what is damaged in a cache is made again, with one warning ---


class PlanUser:
    """Uses the cache once; says whether the content was made anew."""

    def __init__(self, folder):
        self.cache, self.builds = folder / "cache", 0

    def use(self):
        before = self.builds
        assert PlanCache(self.cache, PLAN_KEY).get_or_build(self._build).data == b"plan bytes"
        return self.builds > before

    def _build(self):
        self.builds += 1
        return Plan(data=b"plan bytes", report={"layers": []})


class OpenVinoUser:
    def __init__(self, folder):
        pytest.importorskip("openvino")
        self.cache, self.graph = folder / "cache", write_scale(folder / "scale.onnx")

    def use(self):
        before = self._written()
        options = BackendOptions(num_threads=1, cache_dir=self.cache)
        session = BACKEND.load(
            self.graph, device="cpu", precision="float32", options=options
        ).session()
        x = np.arange(64, dtype=np.float32)[None]
        np.testing.assert_allclose(session.run({"x": x})["y"], 3 * x, rtol=1e-2)
        session.close()
        return self._written() != before

    def _written(self):
        blobs = [blob for blob in self.cache.rglob("*.blob") if blob.is_file()]
        return [(blob.stat().st_ino, blob.stat().st_mtime_ns) for blob in blobs]


# Each is given the free place of the entry and the content it had (None: it was a folder).
CONTENTS = {
    "garbage": lambda entry, content: entry.write_bytes(b"\x93NUMPY\x01\0v\0{'descr':\n" * 9),
    "truncated": lambda entry, content: entry.write_bytes((content or b"xx")[:-2]),
    "empty": lambda entry, content: entry.write_bytes(b""),
    "nested": lambda entry, content: entry.write_bytes(b"[" * 200_000),
}
BLOB = "openvino/*/*.blob"
# One for an entry of the store, whose damages are in unit/test_files, and OpenVINO's own files.
CASES = [
    (PlanUser, "engines/*.plan", CONTENTS["truncated"]),
    (OpenVinoUser, BLOB, CONTENTS["garbage"]),
    (OpenVinoUser, BLOB, CONTENTS["truncated"]),
    (OpenVinoUser, BLOB, lambda entry, content: os.mkfifo(entry)),
    (OpenVinoUser, "openvino/*/checksums.json", CONTENTS["nested"]),
    (OpenVinoUser, "openvino/" + "[0-9a-f]" * 32, CONTENTS["empty"]),
]


def replace_entry(user, pattern, damage):
    (entry,) = user.cache.glob(pattern)
    content = None if entry.is_dir() else entry.read_bytes()
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    damage(entry, content)
    return entry


@pytest.mark.parametrize(("user", "pattern", "damage"), CASES)
def test_damaged_entries_are_made_again_with_one_warning(tmp_path, caplog, user, pattern, damage):
    caplog.set_level(logging.WARNING, logger="zsseg_rt")
    user = user(tmp_path)
    assert user.use()
    entry = replace_entry(user, pattern, damage)
    user.use()
    assert len(caplog.records) == 1, caplog.text
    assert str(entry) in caplog.text or str(entry.parent) in caplog.text
    caplog.clear()
    assert not user.use(), "the entry was not made again"
    assert not caplog.records


@pytest.mark.parametrize("user", [PlanUser, OpenVinoUser])
@pytest.mark.parametrize("place", ["cache", "part"])
def test_a_file_where_a_folder_belongs_only_costs_the_cache(tmp_path, caplog, user, place):
    caplog.set_level(logging.WARNING, logger="zsseg_rt")
    user = user(tmp_path)
    parts = [user.cache / part for part in ("engines", "openvino")]
    for path in [user.cache] if place == "cache" else parts:
        path.parent.mkdir(exist_ok=True)
        path.write_text("in the way")
    user.use()
    assert caplog.records
    assert (user.cache if place == "cache" else parts[0]).read_text() == "in the way"
