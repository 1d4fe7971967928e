"""Class names become phrases in the caller's order; bad names are refused by name."""

import numpy as np
import pytest

from zsseg_rt.errors import DTypeError, ShapeError, VocabularyError
from zsseg_rt.vocabulary import BACKGROUND, Vocabulary, check_embeddings, read_class_specs


def make_vocabulary(classes, background=()):
    specs = read_class_specs(classes, background)
    return Vocabulary(
        names=specs.names,
        phrases=specs.phrases,
        phrase_classes=specs.phrase_classes,
        embeds=np.ones((len(specs.phrases), 3), np.float32),
        version=1,
    )


def test_order_is_the_callers():
    specs = read_class_specs(["zebra", "ant", "mole"])
    assert specs.names == ("zebra", "ant", "mole")
    assert specs.phrase_classes.tolist() == [0, 1, 2]


def test_synonyms_and_background_map_to_classes():
    specs = read_class_specs([["car", "van"], "road"], ["sky"])
    assert specs.names == ("car", "road")
    assert specs.phrases == ("car", "van", "road", "sky")
    assert specs.phrase_classes.tolist() == [0, 0, 1, BACKGROUND]


def test_label_table_sends_background_and_unknown_to_unknown():
    table = make_vocabulary([["car", "van"], "road"], ["sky"]).label_table
    assert table[[0, 1, 2, 3, 255]].tolist() == [0, 0, 1, 255, 255]
    assert table.dtype == np.uint8


def test_label_table_is_wide_when_phrases_are():
    table = make_vocabulary([[f"c{i}", f"d{i}"] for i in range(200)]).label_table
    assert table.dtype == np.uint8
    assert len(table) == 65536
    assert table[399] == 199
    assert table[65535] == 255


def test_label_table_above_254_classes_is_uint16():
    table = make_vocabulary([f"c{i}" for i in range(300)]).label_table
    assert table.dtype == np.uint16
    assert table[299] == 299
    assert table[65535] == 65535


def test_embeddings_are_read_only():
    vocabulary = make_vocabulary(["a"])
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.embeds[0, 0] = 2.0


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "expected at least one class, got none"),
        (["road", " "], r"class_names\[1\]: expected a name, got an empty string"),
        (["road", "car", "road"], "got 'road' at places 0 and 2"),
        (["road", "road "], "got 'road' at places 0 and 1"),
        (["road", 3], r"class_names\[1\]: expected a string, got int 3"),
        ("road", "expected a list of names, got the string 'road'"),
        ([["a"], []], r"class_names\[1\]: expected at least one synonym"),
        ([f"c{i}" for i in range(1025)], "at most 1024 phrases .* got 1025"),
    ],
)
def test_bad_names_are_refused(classes, message):
    with pytest.raises(VocabularyError, match=message):
        read_class_specs(classes)


def test_background_may_not_repeat_a_class():
    with pytest.raises(VocabularyError, match="'road'"):
        read_class_specs(["road"], ["road"])


def test_bad_embeddings_are_refused():
    good = np.ones((2, 4), np.float32)
    check_embeddings(good, 2, 4)
    with pytest.raises(DTypeError, match="got float64"):
        check_embeddings(good.astype(np.float64), 2, 4)
    with pytest.raises(DTypeError, match="got list"):
        check_embeddings([[1.0]], 1, 1)
    with pytest.raises(ShapeError, match=r"expected shape \(2, 5\).*got \(2, 4\)"):
        check_embeddings(good, 2, 5)
    with pytest.raises(VocabularyError, match="NaN or infinity in row 1"):
        check_embeddings(np.array([[1, 1], [1, np.nan]], np.float32), 2, 2)
    with pytest.raises(VocabularyError, match="norm is from 1e-12 to 1e12, got 0 in row 0"):
        check_embeddings(np.array([[0, 0], [1, 1]], np.float32), 2, 2)
