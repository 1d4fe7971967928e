"""Phrase embeddings: template ensembles, caches in memory and on disk, and damaged caches."""

import dataclasses
import os
import threading

import numpy as np
import pytest

from support.errors import refused
from support.fakes import write_fake_bundle
from zsseg_rt import Bundle, VocabularyError
from zsseg_rt.bundles.specs import FileEntry, TextBankEntry, TextSpec
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.text import embeddings
from zsseg_rt.text.class_names import ClassList
from zsseg_rt.text.embeddings import PhraseEmbedder, RowCache, VocabularyMaker
from zsseg_rt.text.vocabulary import PromptSet


class CountingEncoder:
    """Embeds the letters of a prompt, and counts how many prompts it was given."""

    inputs = (TensorSpec(name="token_ids", dtype="int64", shape=("prompts", 77)),)

    def __init__(self):
        self.prompts = 0
        self.largest_batch = 0

    def run(self, feeds, *, stream=0):
        tokens = feeds["token_ids"]
        self.prompts += len(tokens)
        self.largest_batch = max(self.largest_batch, len(tokens))
        return {"text_embeds": tokens[:, :3].astype(np.float32) + 1.0}

    def close(self):
        pass


class LetterTokenizer:
    def __init__(self, path, context_length):
        self.context_length = context_length

    def encode(self, texts):
        rows = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            letters = [ord(c) for c in text][: self.context_length]
            row[: len(letters)] = letters
        return rows


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "Tokenizer", LetterTokenizer)
    root = write_fake_bundle(tmp_path / "b.zsseg")
    tokenizer = root / "tokenizer.json"
    tokenizer.write_text("{}")
    loaded = Bundle.load(root)
    text = TextSpec(
        embed_dim=3,
        templates=("{} a", "{} b"),
        tokenizer=FileEntry.describe(tokenizer, root),
        encoder_sha256="e" * 64,
    )
    graphs = {**loaded.graphs, "text_encoder": loaded.graphs["image_encoder"]}
    return dataclasses.replace(loaded, text=text, graphs=graphs)


def test_embedding_is_the_normalised_mean_over_templates(bundle):
    embedder = PhraseEmbedder(bundle, CountingEncoder, None)
    (row,) = embedder.embed(["xy"])
    parts = [np.array([ord(c) + 1.0 for c in prompt[:3]]) for prompt in ("xy a", "xy b")]
    mean = np.mean([p / np.linalg.norm(p) for p in parts], axis=0)
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-6)


def test_known_phrases_are_not_embedded_again(bundle, tmp_path):
    encoder = CountingEncoder()
    embedder = PhraseEmbedder(bundle, lambda: encoder, tmp_path / "cache")
    first = embedder.embed(["cat", "dog"])
    assert encoder.prompts == 4
    np.testing.assert_array_equal(embedder.embed(["dog", "cat"]), first[::-1])
    assert encoder.prompts == 4
    embedder.embed(["cat", "owl"])
    assert encoder.prompts == 6
    new_process = PhraseEmbedder(bundle, None, tmp_path / "cache")  # it loads no encoder
    np.testing.assert_array_equal(new_process.embed(["cat", "dog"]), first)
    embedder.embed(["cat"], ["the {}"])  # templates have entries of their own
    assert encoder.prompts == 7


def test_rows_without_direction_are_not_stored(bundle, tmp_path):
    class Broken(CountingEncoder):
        def run(self, feeds, *, stream=0):
            return {"text_embeds": np.full((len(feeds["token_ids"]), 3), np.nan, np.float32)}

    cache = tmp_path / "cache"
    PhraseEmbedder(bundle, Broken, cache).embed(["cat"])
    assert np.isfinite(PhraseEmbedder(bundle, CountingEncoder, cache).embed(["cat"])).all()


@pytest.mark.parametrize("change", ["encoder", "tokenizer", "context_length"])
def test_another_text_side_has_its_own_entries(bundle, tmp_path, change):
    PhraseEmbedder(bundle, CountingEncoder, tmp_path / "cache").embed(["cat"])
    if change == "encoder":
        entry = dataclasses.replace(bundle.graphs["text_encoder"]["float32"], sha256="f" * 64)
        other = dataclasses.replace(bundle, graphs={"text_encoder": {"float32": entry}})
    elif change == "tokenizer":
        (bundle.path / "tokenizer.json").write_text("{} ")
        changed = FileEntry.describe(bundle.path / "tokenizer.json", bundle.path)
        other = dataclasses.replace(
            bundle, text=dataclasses.replace(bundle.text, tokenizer=changed)
        )
    else:
        other = dataclasses.replace(bundle, text=dataclasses.replace(bundle.text, context_length=9))
    encoder = CountingEncoder()
    PhraseEmbedder(other, lambda: encoder, tmp_path / "cache").embed(["cat"])
    assert encoder.prompts == 2


def test_full_disk_keeps_working_and_says_so(bundle, tmp_path, monkeypatch, caplog):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    rows = PhraseEmbedder(bundle, CountingEncoder, tmp_path / "cache").embed(["cat"])
    assert rows.shape == (1, 3)
    assert "No space left on device" in caplog.text
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_many_prompts_run_in_bounded_batches(bundle):
    encoder = CountingEncoder()
    rows = PhraseEmbedder(bundle, lambda: encoder, None).embed([f"c{i}" for i in range(150)])
    assert rows.shape == (150, 3)
    assert encoder.prompts == 300
    assert encoder.largest_batch == embeddings.PROMPTS_PER_RUN


def test_memory_keeps_the_phrases_that_were_used_last(bundle, monkeypatch):
    monkeypatch.setattr(embeddings, "KEPT_PHRASES", 3)
    encoder = CountingEncoder()
    embedder = PhraseEmbedder(bundle, lambda: encoder, None)
    embedder.embed(["a", "b", "c"])
    embedder.embed(["a"])  # b is the oldest now
    embedder.embed(["d"])
    before = encoder.prompts
    embedder.embed(["a", "c", "d"])
    assert encoder.prompts == before
    embedder.embed(["b"])
    assert encoder.prompts == before + 2  # two templates


def test_text_bank_answers_first_and_unknown_names_get_a_hint(tmp_path):
    from safetensors.numpy import save_file

    root = write_fake_bundle(tmp_path / "b.zsseg")
    bank = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"embeds": bank}, root / "bank.safetensors")
    described = FileEntry.describe(root / "bank.safetensors", root)
    loaded = dataclasses.replace(
        Bundle.load(root), text_bank=TextBankEntry(**vars(described), names=("road", "tree"))
    )
    embedder = PhraseEmbedder(loaded, CountingEncoder, None)
    np.testing.assert_array_equal(embedder.embed(["tree", "road"]), bank[::-1])
    np.testing.assert_array_equal(embedder.embed(["Tree", " ROAD "]), bank[::-1])
    assert embedder.banks("Road")
    np.testing.assert_array_equal(embedder.embed(["trees", "Bush"]), bank[[1, 1]])
    assert not embedder.banks("wall")  # what it may stand for is not in this bank
    with refused(VocabularyError, "class_names", "'treee'", "'tree'"):
        embedder.embed(["treee"])


def test_a_text_that_lists_names_draws_a_remark(bundle, caplog):
    prompt_sets = [PromptSet(templates=bundle.text.templates)]
    maker = VocabularyMaker(bundle, prompt_sets, CountingEncoder, cache_dir=None, keep_encoder=True)
    classes = ClassList.read(["sky", ["road, street, lane", "way"], "car"])
    embeddings = maker.embed(classes, None)
    (remark,) = embeddings.remarks
    assert str(["road", "street", "lane"]) in remark
    assert [record.getMessage() for record in caplog.records] == [remark]
    assert embeddings.names == classes.names  # nothing is refused or split


ROW = np.array([0.6, 0.0, 0.8, 0.0], np.float32)


def stored(folder):
    return list(folder.glob("text/*/*"))


def test_the_oldest_go(tmp_path):
    cache, paths = RowCache(tmp_path, "encoder", max_rows=16), []
    for age in range(16, 0, -1):  # seconds since they were written
        cache.write("templates", {f"class {age}": ROW})
        (new,) = set(stored(tmp_path)) - set(paths)
        os.utime(new, (new.stat().st_mtime - 100 * age,) * 2)
        paths.append(new)
    RowCache(tmp_path, "encoder", max_rows=16).write("templates", {"new": ROW})
    assert [path.exists() for path in paths] == [False] * 3 + [True] * 13
    np.testing.assert_array_equal(cache.read("templates", "new"), ROW)
    assert cache.read("templates", "class 16") is None


def test_several_writers_do_not_fill_the_disk(tmp_path, caplog):
    def fill(number):
        cache = RowCache(tmp_path, "encoder", max_rows=16)
        for index in range(60):
            cache.write("templates", {f"{number} {index}": ROW})

    writers = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert not caplog.records
    assert len(stored(tmp_path)) <= 16 + 4 * 4
    for path in stored(tmp_path):
        assert path.read_bytes().partition(b"\n")[2] == ROW.tobytes()  # whole
