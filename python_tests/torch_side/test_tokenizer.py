"""The bundle's tokenizer gives the ids of open_clip's, without open_clip."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsseg_rt.errors import BundleError, ShapeError
from zsseg_rt.text.tokenizer import Tokenizer

open_clip_tokenizer = pytest.importorskip("open_clip.tokenizer")

from support.errors import refused  # noqa: E402
from zsseg_rt.export.words import tokenizer_json  # noqa: E402

UNUSUAL = [
    "",
    "sch\u00c3\u00b6n",
    "   \t\n ",
    "a photo of a DINING-TABLE!",
    "the dog's they'll I'd we've you're I'm don't",
    "the dog\u2019s \u201cbig\u201d bone",
    "42 cars, 3.14",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u9053\u8def \u4eba \u30d5\u30a9\u30fc\u30af\u30ea\u30d5\u30c8 \ud558\ub298",
    "\uff26\uff35\uff2c\uff2c \uff76\uff9e\u3000wide",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \u212b",
    "z\u0351\u0321a\u0300\u0301\u0302lgo",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u200f\u202bx\u202c",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeff\u2060",
    "bell\x07 escape \x1b[31mred\x1b[0m null\x00 tab\tvt\x0bff\x0c",
    "\u0130stanbul \u03a3\u0399\u03a3\u03a5\u03a6\u039f\u03a3",
    "\u1e9e \u01c5 \u017fun the\u017f '\u017f",
    "\ufb01sh \ufb03 \u0132sselmeer \u0149",
    "a\r\nb\rc\u2028d\u2029e",
    "caf&eacute; &EACUTE; &amp;amp; &#233; &lt;b&gt; AT&T &not; &notanentity;",
    "<b>&eacute;</b> &AMP;",
    "\ud800 lone \udc00 pair \ud83d\ude00",
    "<start_of_text> <end_of_text>",
    "x<END_OF_TEXT>y !<end_of_text> <end_of_text><start_of_text>",
    "\u2167 \u00bd \u0663 \u00b2 1234567890",
    "a\u0345b",
    "word " * 100,
    "9" * 200,
    "\U0001f600" * 60,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json())


@pytest.fixture(scope="module")
def official() -> object:
    return open_clip_tokenizer.SimpleTokenizer()


def test_golden_prompts(tokenizer, shared_dir):
    golden = np.load(shared_dir / "golden/zs_tokens_public.npz")
    folder = shared_dir / "data/clip_text_embeddings/vitb16"
    coco = (folder / "coco171_names.txt").read_text().splitlines()[:171]
    voc = (folder / "voc20_names.txt").read_text().splitlines()[:20]
    for names, key in ((voc, "voc_single"), (coco, "coco_single")):
        np.testing.assert_array_equal(
            tokenizer.encode([f"a photo of a {name}" for name in names]), golden[key]
        )
    multi = [str(template).format(name) for name in coco for template in golden["templates"]]
    np.testing.assert_array_equal(
        tokenizer.encode(multi).reshape(171, 15, 77), golden["coco_multi"]
    )


# The two Unicode tables may know different new characters: draw from those Python has names for.
_TEXT = st.text(st.characters(exclude_categories=["Cn", "Co"]), max_size=40)
_PIECES = st.lists(
    st.sampled_from(
        ["'s", "'LL", "&amp;", "&#8217;", "<", "\u0301", "\u00a0", "\r", "\x1b[1m", "K"]
    )
    | _TEXT,
    max_size=6,
).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=_PIECES)
def test_any_text_matches_open_clip(tokenizer, official, text):
    np.testing.assert_array_equal(tokenizer.encode([text]), official([text]).numpy())


def test_unusual_text_matches_open_clip(tokenizer, official):
    expected = official(UNUSUAL).numpy()
    for row, ids, text in zip(tokenizer.encode(UNUSUAL), expected, UNUSUAL, strict=True):
        np.testing.assert_array_equal(row, ids, err_msg=repr(text))


def test_file_is_complete_for_other_readers(tokenizer, tmp_path):
    from tokenizers import Tokenizer as JsonTokenizer

    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json())
    ids = JsonTokenizer.from_file(str(path)).encode("A  photo of a CAFE\u0301").ids
    ours = Tokenizer(path).encode(["A  photo of a CAFE\u0301"])[0]
    assert ids == ours[: len(ids)].tolist()


def edited(keys, value):
    """CLIP's tokenizer.json with one value changed; ``...`` deletes it."""
    document = json.loads(tokenizer_json())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return json.dumps(document).encode()


PATTERN = ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")
MODEL = ("model",)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (PATTERN, "(a+)+$", "one whose pre_tokenizer CLIP's does not have"),
        (("normalizer", "normalizers", 1, "pattern", "Regex"), "(x+x+)+y", "one whose normalizer"),
        (("post_processor",), None, "one whose post_processor"),
        (("added_tokens",), [{"id": 0}], "one whose added_tokens"),
        (("further",), 1, "one whose further"),
        (("version",), ..., "one whose version"),
        ((*MODEL, "continuing_subword_prefix"), "\u00e9", "one whose model"),
        ((*MODEL, "vocab"), [], "no model with a vocabulary"),
        ((*MODEL, "vocab"), {}, "a merge that is|one without '<start_of_text>'"),
        ((*MODEL, "vocab", "a"), 1, "tokens that are not numbered"),
        ((*MODEL, "vocab", "a"), True, "numbers are not integers"),
        ((*MODEL, "vocab", "<end_of_text>"), ..., "a later '<end_of_text>'"),
        ((*MODEL, "merges", 0), "a", "a merge that is not a pair of known tokens: 'a'"),
        ((*MODEL, "merges", 0), ["i", "n"], "a merge that is not a pair"),
        ((*MODEL, "merges"), None, "no model with a vocabulary and merges"),
    ],
)
def test_any_other_tokenizer_is_refused(keys, value, message):
    with pytest.raises(BundleError, match=f"json: expected a CLIP tokenizer, got .*{message}"):
        Tokenizer(edited(keys, value))


WILD = [b"[" * 200_000, b'{"a": "\xff"}', b"9" * 9999, b"", b"\0", b"{", b'{"model": []}']


def test_wild_and_absent_files_and_markers_in_the_wrong_order_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with refused(BundleError, None, "tokenizer.json"):
        Tokenizer(path)
    for content in WILD:
        path.write_bytes(content)
        with refused(BundleError, None, "tokenizer.json"):
            Tokenizer(path)
    vocab = json.loads(tokenizer_json())["model"]["vocab"]
    vocab["<start_of_text>"], vocab["<end_of_text>"] = 49407, 49406
    with refused(BundleError, "tokenizer.json", "'<start_of_text>'", "'<end_of_text>'"):
        Tokenizer(edited((*MODEL, "vocab"), vocab))


def test_context_length_too_short():
    with refused(ShapeError, "context_length"):
        Tokenizer(tokenizer_json(), context_length=1)
