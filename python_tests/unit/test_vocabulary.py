"""Class names become phrases in the caller's order; bad names are refused by name."""

import json
import logging

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt.cli.options import read_background, read_classes
from zsseg_rt.errors import DatasetError, DTypeError, ShapeError, SourceError, VocabularyError
from zsseg_rt.text.class_names import BACKGROUND, ClassList
from zsseg_rt.text.name_lists import read_name_list
from zsseg_rt.text.vocabulary import Vocabulary, check_embeddings, check_templates


def make_vocabulary(classes, background=()):
    specs = ClassList.read(classes, background)
    return Vocabulary(
        names=specs.names,
        phrases=specs.phrases,
        phrase_classes=specs.phrase_classes,
        embeds=np.ones((len(specs.phrases), 3), np.float32),
        version=1,
    )


def test_synonyms_and_background_map_to_classes():
    specs = ClassList.read([["car", "van"], "road"], ["sky"])
    assert specs.names == ("car", "road")
    assert specs.phrases == ("car", "van", "road", "sky")
    assert specs.phrase_classes.tolist() == [0, 0, 1, BACKGROUND]


def test_label_tables_send_background_and_what_is_no_phrase_to_unknown():
    table = make_vocabulary([["car", "van"], "road"], ["sky"]).label_table
    assert table[[0, 1, 2, 3, 255]].tolist() == [0, 0, 1, 255, 255]
    assert table.dtype == np.uint8
    table = make_vocabulary([f"c{i}" for i in range(300)]).label_table
    assert (table.dtype, table[299], table[65535]) == (np.uint16, 299, 65535)
    assert not make_vocabulary(["a"]).embeds.flags.writeable


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


@pytest.mark.parametrize(
    "name", ["stra\u00dfe", "\u9053\u8def", "\U0001f468\u200d\U0001f469", " road\n"]
)
def test_names_of_any_language_are_taken(name):
    assert ClassList.read([name]).names == (name.strip(),)


@pytest.mark.parametrize("background", [["sky\ud800"], ["a\0b"], [None], "sky", None, 3])
def test_background_is_checked_as_names_are(background):
    with refused(VocabularyError, "background"):
        ClassList.read(["road"], background)


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


def test_a_class_takes_over_what_is_also_background():
    assert ClassList.read([["road", "Lane"]], ["lane", "sky", " Sky"]).background == ("sky",)
    alike = ClassList.read(["car"], ["auto"], meaning=lambda word: "car")
    assert alike.phrases == ("car",)


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


def test_a_mapping_names_classes_and_their_further_synonyms():
    specs = ClassList.read({"red ball": ["red sphere", "red ball"], "box": "crate", "sky": ()})
    assert specs.names == ("red ball", "box", "sky")
    assert specs.phrases == ("red ball", "red sphere", "box", "crate", "sky")
    assert specs.phrase_classes.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("synonyms", [None, 3, {"a": 1}])
def test_a_mapping_to_something_else_is_refused(synonyms):
    with refused(VocabularyError, "class_names['ball']"):
        ClassList.read({"ball": synonyms})


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


def test_lines_end_where_every_other_program_ends_them(tmp_path):
    assert listed(tmp_path, "road\u2028car\ntree").ids == (0, 1)


def test_a_table_has_a_row_for_every_line(tmp_path):
    rows = np.arange(3, dtype=np.float32)[:, None]
    assert listed(tmp_path, "car\nvoid\nroad").pick(rows).ravel().tolist() == [0, 2]
    assert listed(tmp_path, "__ignore__\ncar\nroad").pick(rows).ravel().tolist() == [1, 2]
    assert listed(tmp_path, "1 car\n2 road\n3 tree").pick(rows).ravel().tolist() == [0, 1, 2]
    for content in ("car\nroad", "0 car\n1 road\n7 tree"):
        with pytest.raises(ValueError, match="rows"):
            listed(tmp_path, content).pick(rows)
