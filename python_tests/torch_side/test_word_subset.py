"""A text tower cut down to some words embeds them as before, and refuses names of other words."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from support import tiny
from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.cli import main
from zsseg_rt.errors import CheckpointError, VocabularyError
from zsseg_rt.export import export_bundle
from zsseg_rt.export.words import keep_words, tokenizer_json, written_text
from zsseg_rt.models.clip.towers import TextEncoder, TextEncoderConfig
from zsseg_rt.text.tokenizer import Tokenizer

WORDS = ("red", "tiled", "checkered", "floor", "ball")
OTHERS = ("a", "photo", "of", ".")
SIZES = {"width": 64, "num_layers": 2, "num_heads": 1, "mlp_width": 64, "embed_dim": 16}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TextEncoder(TextEncoderConfig(context_length=16, **SIZES)).eval()


@pytest.fixture(scope="module")
def subset(encoder):
    return keep_words(encoder, WORDS, OTHERS)


def embed(encoder, tokenizer, texts):
    return encoder(torch.from_numpy(tokenizer.encode(texts))).detach()


def test_known_words_are_embedded_as_before(encoder, subset):
    texts = ["a photo of a red tiled floor.", "Checkered BALL", "ball ball", "."]
    expected = embed(encoder, Tokenizer(tokenizer_json(), 16), texts)
    tokens = Tokenizer(subset.tokenizer_json, 16).encode(texts)
    np.testing.assert_allclose(subset.encoder.embed(tokens), expected, rtol=1e-4, atol=1e-6)
    rows = torch.tensor(subset.rows)[torch.from_numpy(tokens)]
    torch.testing.assert_close(encoder(rows).detach(), expected)
    assert subset.encoder.vocab_size < 20
    assert len(subset.tokenizer_json) < 20_000


def test_unknown_words_are_left_out(subset):
    tokenizer = Tokenizer(subset.tokenizer_json, 16)
    plain = tokenizer.encode(["red ball"])
    # "bred" holds the token of "red" behind a letter that has none.
    for text in ("red zebra ball", "bred red ball", "red ball, schön", "red <end_of_text> ball"):
        np.testing.assert_array_equal(tokenizer.encode([text]), plain)
    assert tokenizer.unknown_words("a bred red Zebra!") == ["bred", "zebra", "!"]
    assert Tokenizer(tokenizer_json(), 16).unknown_words("zebra") == []
    assert tokenizer.encode(["red ball " * 20]).max() == tokenizer.encode(["red"])[0, 2]
    ids = tokenizer.encode(["a photo of a red zebra ball.", "\u00e9\u00e8 zzz"])
    assert ids.max() == subset.encoder.vocab_size - 1


def test_bad_words_and_another_vocabulary_are_refused(encoder, subset):
    for words, message in (
        ((), "words: expected at least one, got none"),
        (("red ball",), "got 'red ball'"),
        (("Red",), "got 'Red'"),
    ):
        with pytest.raises(VocabularyError, match=message):
            keep_words(encoder, words)
    with refused(CheckpointError, "encoder", "49408", "14"):
        keep_words(subset.encoder, WORDS)


def test_a_bundle_knows_its_words(tmp_path, capsys, caplog):
    """A name of other words alone is refused, an unknown word in a name left out and told."""
    model = tiny.zegclip_model()
    sizes = SIZES | {"embed_dim": model.config.image_encoder.embed_dim}
    torch.manual_seed(0)
    encoder = TextEncoder(TextEncoderConfig(context_length=16, **sizes)).eval()
    bundle = export_bundle(
        model,
        tmp_path / "few.zsseg",
        class_names=["red" + " tiled" * n + " ball" for n in range(7)],
        text_encoder=replace(written_text(encoder), words=WORDS, prompt_words=OTHERS),
        precisions=("float32",),
        verify=False,
    )
    assert Bundle.load(bundle).text.words == WORDS
    with Engine(bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        assert engine.self_check().passed
        for name in ("zebra", "a photo", "bred"):
            message = rf"got '{name}'.*red, tiled, checkered, floor"
            with pytest.raises(VocabularyError, match=message):
                engine.set_classes(["red ball", name])
        embeds = engine.set_classes(["red ball", "shiny red ball", "Tiled Floor"]).embeds
    np.testing.assert_array_equal(embeds[0], embeds[1])
    assert "'shiny red ball': the bundle's text encoder never learned 'shiny'" in caplog.text
    assert not np.allclose(embeds[0], embeds[2])
    assert main(["info", str(bundle)]) == 0
    assert "words: red, tiled, checkered, floor, ball" in capsys.readouterr().out
