"""Class names and their files become phrases in the caller's order; phrases become embeddings."""

import dataclasses
import json
import logging
import os
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.errors import refused
from support.fakes import write_fake_bundle
from support.full_disk import disk_with_room_for
from zsseg_rt import Bundle
from zsseg_rt.bundles.specs import FileEntry, TextBankEntry, TextSpec
from zsseg_rt.cli.options import read_background, read_classes
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import DatasetError, DTypeError, ShapeError, SourceError, VocabularyError
from zsseg_rt.text import embeddings
from zsseg_rt.text.class_names import BACKGROUND, ClassList
from zsseg_rt.text.embeddings import PhraseEmbedder, RowCache, VocabularyMaker
from zsseg_rt.text.name_lists import read_name_list
from zsseg_rt.text.vocabulary import PromptSet, Vocabulary, check_embeddings, check_templates


def test_names_synonyms_and_background_become_phrases():
    specs = ClassList.read([["car", "van"], "road"], ["sky"])
    assert specs.names == ("car", "road")
    assert specs.phrases == ("car", "van", "road", "sky")
    assert specs.phrase_classes.tolist() == [0, 0, 1, BACKGROUND]
    # A class takes over what is also background.
    assert ClassList.read([["road", "Lane"]], ["lane", "sky", " Sky"]).background == ("sky",)
    alike = ClassList.read(["car"], ["auto"], meaning=lambda word: "car")
    assert alike.phrases == ("car",)
    specs = ClassList.read({"red ball": ["red sphere", "red ball"], "box": "crate", "sky": ()})
    assert specs.names == ("red ball", "box", "sky")
    assert specs.phrases == ("red ball", "red sphere", "box", "crate", "sky")
    assert specs.phrase_classes.tolist() == [0, 0, 1, 1, 2]
    names = ["stra\u00dfe", "\u9053\u8def", "\U0001f468\u200d\U0001f469", " road\n"]
    assert ClassList.read(names).names == tuple(name.strip() for name in names)


def test_label_tables_send_background_and_what_is_no_phrase_to_unknown():
    def vocabulary(classes, background=()):
        read = ClassList.read(classes, background)
        parts = {name: getattr(read, name) for name in ("names", "phrases", "phrase_classes")}
        return Vocabulary(**parts, embeds=np.ones((len(read.phrases), 3), np.float32), version=1)

    table = vocabulary([["car", "van"], "road"], ["sky"]).label_table
    assert table[[0, 1, 2, 3, 255]].tolist() == [0, 0, 1, 255, 255]
    assert table.dtype == np.uint8
    table = vocabulary([f"c{i}" for i in range(300)]).label_table
    assert (table.dtype, table[299], table[65535]) == (np.uint16, 299, 65535)
    assert not vocabulary(["a"]).embeds.flags.writeable


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "expected at least one class, got none"),
        (["road", " "], r"class_names\[1\]: expected a name, got an empty string"),
        (["road", "car", "road "], "got these again: 'road'"),
        (["Road", "sky", ["road", "SKY"]], "'Road', 'sky', 'road', 'SKY'"),
        (["road", 3], r"class_names\[1\]: expected a string, got int 3"),
        (["road", None], r"class_names\[1\]: expected a string, got NoneType None"),
        (
            ["road", "ca\ud800r"],
            r"class_names\[1\]: .*half of a surrogate pair at position 2 of 'ca\\ud8",
        ),
        (["a\0b"], r"\[0\]: .*character at position 1 of 'a\\x00b'. Remove it"),
        (["\x1b[31mred"], r"class_names\[0\]: .*a control character at position 0"),
        (["dining\ttable"], r"class_names\[0\]: .*a control character at position 6"),
        ([["car", "v\udcffn"]], r"class_names\[0\]: .*half of a surrogate pair"),
        ("person ,car,", r"expected a list of names, got the string .*Write \['person', 'car'\]\."),
        ([["a"], []], r"class_names\[1\]: expected at least one synonym"),
        ([f"c{i}" for i in range(1025)], "at most 1024 phrases .* got 1025"),
    ],
)
def test_bad_names_are_refused(classes, message):
    with pytest.raises(VocabularyError, match=message):
        ClassList.read(classes)


def test_background_and_synonyms_are_checked_as_names_are():
    for background in (["sky\ud800"], ["a\0b"], [None], "sky", None, 3):
        with refused(VocabularyError, "background"):
            ClassList.read(["road"], background)
    for synonyms in (None, 3, {"a": 1}):
        with refused(VocabularyError, "class_names['ball']"):
            ClassList.read({"ball": synonyms})


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([None], r"templates\[0\]: expected a string, got NoneType None"),
        (["a {}", 3], r"templates\[1\]: expected a string, got int 3"),
        (["a {}\ud800"], r"templates\[0\]: .*half of a surrogate pair"),
        (["a\0{}"], r"templates\[0\]: .*a control character"),
        (["{} and {}"], r"templates: expected one '\{\}' in each"),
        ([], "templates: expected at least one"),
        (iter([]), "templates: expected at least one"),
        (3, "templates: expected a list of strings, got 3"),
        ("a {}", "templates: expected a list of strings, got 'a {}'"),
    ],
)
def test_bad_templates_are_refused(templates, message):
    with pytest.raises(VocabularyError, match=message):
        check_templates(templates)


def test_bad_embeddings_are_refused():
    good = np.ones((2, 4), np.float32)
    check_embeddings(good, 2, 4)
    for error, embeds, shape in (
        (DTypeError, good.astype(np.float64), (2, 4)),
        (DTypeError, [[1.0]], (1, 1)),
        (ShapeError, good, (2, 5)),
        (VocabularyError, np.array([[1, 1], [1, np.nan]], np.float32), (2, 2)),
        (VocabularyError, np.array([[0, 0], [1, 1]], np.float32), (2, 2)),
    ):
        with refused(error, "embeddings"):
            check_embeddings(embeds, *shape)


# --- files of names ---

CVAT = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:255,0,0::\nroad:128,64,128::\n"


def listed(tmp_path, content, *, with_ids=True):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "names.txt").write_bytes(data)
    return read_name_list(tmp_path / "names.txt", DatasetError, with_ids=with_ids)


@pytest.mark.parametrize(
    ("content", "names", "ids"),
    [
        ("road\ncar\n", ("road", "car"), (0, 1)),
        ("\ufeffroad \r\n car\r\n\r\n\n", ("road", "car"), (0, 1)),
        ("road\rcar", ("road", "car"), (0, 1)),
        ("road\u2028car\ntree", ("road\u2028car", "tree"), (0, 1)),
        ("road\ncar\n".encode("utf-16"), ("road", "car"), (0, 1)),
        ("0 person\n1 car", ("person", "car"), (0, 1)),
        ("1: person\n2: car", ("person", "car"), (1, 2)),
        ("0,person\n3,dog, hound", ("person", "dog, hound"), (0, 3)),
        ("7\troad\n\n# walk\n8\tsidewalk", ("road", "sidewalk"), (7, 8)),
        ("3d printer\n2 wheeler\ncar", ("3d printer", "2 wheeler", "car"), (0, 1, 2)),
        ("road # grey\ncar", ("road", "car"), (0, 1)),
        ("road [unseen]\ncar", ("road", "car"), (0, 1)),
        ("__ignore__\n_background_\ncar\nroad", ("car", "road"), (1, 2)),
        ("_background_\ncar", ("car",), (1,)),
        ("background\ncar", ("background", "car"), (0, 1)),
        ("car\nVoid\nroad", ("car", "road"), (0, 2)),
        (CVAT, ("car", "road"), (1, 2)),
        (json.dumps(["road", ["car", "auto"]]), ("road", "car, auto"), (0, 1)),
    ],
)
def test_a_class_s_id_is_its_line_or_its_number(content, names, ids, tmp_path):
    classes = listed(tmp_path, content)
    assert (classes.names, classes.ids) == (names, ids)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("road\n\ncar", "2"),
        ("# mine\nroad\ncar", "1"),
        ("road\n   \ncar", "2"),
        ("0 road\n1 car\ntree", "3"),
        ("id,name\n0,road\n1,car", "1"),
        ("", "one"),
        (b"stra\xdfe", "4"),
        ("[1", "JSON"),
    ],
)
def test_what_is_no_class_is_refused_with_its_line(content, line, tmp_path):
    with refused(DatasetError, None) as error:
        listed(tmp_path, content)
    assert f"names.txt: line {line}" in str(error.value) or line in str(error.value)


def test_without_ids_empty_lines_and_comments_are_skipped(tmp_path, caplog):
    (tmp_path / "names.txt").write_text(
        "\ufeff# mine\n\n0: road, street\n1: car [unseen]\n2: void\n"
    )
    with caplog.at_level(logging.WARNING):
        argument = f"@{tmp_path / 'names.txt'}"
        assert read_classes(argument, []) == [["road", "street"], "car"]
    assert "void" in caplog.text
    assert read_background(argument, 2) == ["road", "street", "car"]
    with refused(SourceError, None, "none.txt"):
        read_classes(f"@{tmp_path / 'none.txt'}", [])


def test_a_table_has_a_row_for_every_line(tmp_path):
    rows = np.arange(3, dtype=np.float32)[:, None]
    assert listed(tmp_path, "car\nvoid\nroad").pick(rows).ravel().tolist() == [0, 2]
    assert listed(tmp_path, "__ignore__\ncar\nroad").pick(rows).ravel().tolist() == [1, 2]
    assert listed(tmp_path, "1 car\n2 road\n3 tree").pick(rows).ravel().tolist() == [0, 1, 2]
    for content in ("car\nroad", "0 car\n1 road\n7 tree"):
        with pytest.raises(ValueError, match="rows"):
            listed(tmp_path, content).pick(rows)


# --- phrases' embeddings: template ensembles, and caches in memory and on disk ---


class CountingEncoder:
    """Embeds the letters of a prompt, and counts how many prompts it was given."""

    inputs = (TensorSpec(name="token_ids", dtype="int64", shape=("prompts", 77)),)

    def __init__(self):
        self.batches = []

    @property
    def prompts(self):
        return sum(self.batches)

    def run(self, feeds, *, stream=0):
        tokens = feeds["token_ids"]
        self.batches.append(len(tokens))
        return {"text_embeds": tokens[:, :3].astype(np.float32) + 1.0}


class LetterTokenizer:
    def __init__(self, path, context_length):
        self.context_length = context_length

    def encode(self, texts):
        padded = [text[: self.context_length].ljust(self.context_length, "\0") for text in texts]
        return np.array([[ord(letter) for letter in text] for text in padded], np.int64)


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


def test_another_text_side_has_its_own_entries(bundle, tmp_path):
    PhraseEmbedder(bundle, CountingEncoder, tmp_path / "cache").embed(["cat"])
    entry = dataclasses.replace(bundle.graphs["text_encoder"]["float32"], sha256="f" * 64)
    (bundle.path / "other.json").write_text("{} ")
    changed = FileEntry.describe(bundle.path / "other.json", bundle.path)
    for changes in (
        {"graphs": {"text_encoder": {"float32": entry}}},
        {"text": dataclasses.replace(bundle.text, tokenizer=changed)},
        {"text": dataclasses.replace(bundle.text, context_length=9)},
    ):
        other, encoder = dataclasses.replace(bundle, **changes), CountingEncoder()
        PhraseEmbedder(other, lambda encoder=encoder: encoder, tmp_path / "cache").embed(["cat"])
        assert encoder.prompts == 2


def test_full_disk_keeps_working_and_says_so(bundle, tmp_path, caplog):
    with disk_with_room_for(0):
        rows = PhraseEmbedder(bundle, CountingEncoder, tmp_path / "cache").embed(["cat"])
    assert rows.shape == (1, 3)
    assert "File too large" in caplog.text
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_many_prompts_run_in_bounded_batches(bundle):
    encoder = CountingEncoder()
    rows = PhraseEmbedder(bundle, lambda: encoder, None).embed([f"c{i}" for i in range(150)])
    assert rows.shape == (150, 3)
    assert encoder.prompts == 300
    assert max(encoder.batches) == embeddings.PROMPTS_PER_RUN


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
