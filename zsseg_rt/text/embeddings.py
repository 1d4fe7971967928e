"""Phrase embeddings: from the bundle's text bank, from memory, from disk, or from the encoder.

A phrase's embedding is the normalised mean of its prompts' normalised embeddings (Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section 3.1.4).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import ConceptSpec
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.common.files import Cache, remove_abandoned
from zsseg_rt.errors import BundleError, VocabularyError
from zsseg_rt.text.class_names import AUTO, Background, ClassList, ClassNames, read_background
from zsseg_rt.text.piece_tokenizer import (
    GEMMA_FILE,
    PIECES_FILE,
    GemmaTokenizer,
    PieceTokenizer,
)
from zsseg_rt.text.tokenizer import Tokenizer, TokenRows, clean_text
from zsseg_rt.text.vocabulary import (
    PromptSet,
    Vocabulary,
    check_embeddings,
    check_templates,
    fill,
    template_key,
)

_log = logging.getLogger(__name__)

TOKENIZERS: Mapping[str, type[PieceTokenizer] | type[GemmaTokenizer]] = {
    PIECES_FILE: PieceTokenizer,
    GEMMA_FILE: GemmaTokenizer,
}
"""By the name of their file in a bundle; other names are CLIP's."""

_MOST_CLOSE = 3
PROMPTS_PER_RUN = 16  # bounds the text encoder's activations: 16 x 77 tokens
KEPT_PHRASES = 8192
"""Phrases whose embeddings stay in memory, 16 MB at 512 floats; the least recently used go."""


class PhraseEmbedder:
    """Embeds phrases for one bundle; the text encoder is loaded when a phrase needs it."""

    def __init__(
        self, bundle: Bundle, load_encoder: Callable[[], Session], cache_dir: Path | None
    ) -> None:
        self._bundle = bundle
        self._load_encoder = load_encoder
        self._stored = _row_cache(bundle, cache_dir)
        self._known: dict[tuple[str, str], npt.NDArray[np.float32]] = {}
        self._session: Session | None = None
        self._tokenizer: TokenRows | None = None
        self._rows: npt.NDArray[np.float16] | None = None
        names = () if bundle.text_bank is None else bundle.text_bank.names
        self._names = BankNames(names, folds=not self._has_encoder)
        self._bank, self._places = read_text_bank(bundle), {n: i for i, n in enumerate(names)}

    def embed(
        self,
        phrases: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        prompt_set: PromptSet | None = None,
    ) -> npt.NDArray[np.float32]:
        """Rows float32 [len(phrases), D] of phrases, of norm 1 but where the bank has others."""
        prompts = prompt_set or PromptSet(templates=self._bundle.text.templates)
        used = tuple(templates or prompts.templates)
        key, banked = template_key(used), {}
        if self._bank and not templates:
            rows = self._bank.get(prompts.bank, self._bank["embeds"])
            names = {p: name for p in phrases if (name := self._names.find(p))}
            banked = {p: rows[self._places[name]] for p, name in names.items()}
        asked = dict.fromkeys(p for p in phrases if p not in banked)
        by_phrase = {p: row for p in asked if (row := self._recall(key, p)) is not None}
        missing = [p for p in asked if p not in by_phrase]
        if missing:
            by_phrase |= self._embed_missing(missing, used, key)
        self._keep(key, by_phrase)
        by_phrase |= banked
        return np.stack([by_phrase[p] for p in phrases]).astype(np.float32, copy=False)

    def banks(self, phrase: str) -> bool:
        """Whether the text bank has this phrase, in capitals or other words for the same."""
        return self._names.find(phrase) is not None

    def meaning(self, phrase: str) -> str:
        """The key of a phrase's embedding: the bank's name, or the text that is embedded."""
        return self._names.find(phrase) or clean_text(phrase)

    @property
    def _has_encoder(self) -> bool:
        return self._bundle.text.tokenizer is not None and "text_encoder" in self._bundle.graphs

    def can_embed(self, phrase: str, *, with_bank: bool = True) -> bool:
        """Whether :meth:`embed` takes a phrase and knows all of its words."""
        if with_bank and self.banks(phrase):
            return True
        text = self._bundle.text
        if not self._has_encoder:
            return False
        return not text.words or set(re.findall(r"\w+", clean_text(phrase))) <= set(text.words)

    def release_encoder(self) -> None:
        """Free the text encoder; it is loaded again for the next new phrase."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _recall(self, key: str, phrase: str) -> npt.NDArray[np.float32] | None:
        row = self._known.get((key, phrase))
        return self._stored.read(key, phrase) if row is None and self._stored else row

    def _keep(self, key: str, rows: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Remember the newest; a server's clients may name new classes for ever."""
        for phrase, row in rows.items():
            self._known.pop((key, phrase), None)  # so that it becomes the newest
            self._known[key, phrase] = row
        while len(self._known) > KEPT_PHRASES:
            del self._known[next(iter(self._known))]

    def _embed_missing(
        self, phrases: list[str], templates: tuple[str, ...], key: str
    ) -> dict[str, npt.NDArray[np.float32]]:
        tokenizer = self._open_tokenizer(phrases)
        self._check_words(phrases, tokenizer)
        prompts = [prompt for phrase in phrases for prompt in fill(templates, phrase)]
        tokens = tokenizer.encode(prompts)
        session = self._session = self._session or self._load_encoder()
        spec = session.inputs[0]
        parts = []
        for start in range(0, len(tokens), PROMPTS_PER_RUN):
            batch = self._inputs(tokens[start : start + PROMPTS_PER_RUN], spec)
            parts.append(np.array(next(iter(session.run({spec.name: batch}).values()))))
        embeds = unit_rows(np.concatenate(parts).astype(np.float32))
        rows = unit_rows(embeds.reshape(len(phrases), len(templates), -1).mean(axis=1))
        embedded = {phrase: row.copy() for phrase, row in zip(phrases, rows, strict=True)}
        if self._stored is not None and np.isfinite(rows).all():
            self._stored.write(key, embedded)
        return embedded

    def _check_words(self, phrases: Sequence[str], tokenizer: TokenRows) -> None:
        """Refuse phrases without any word the text encoder knows; log words it does not know."""
        words = self._bundle.text.words
        if not words:
            return
        strange = [p for p in phrases if not set(words) & set(re.findall(r"\w+", clean_text(p)))]
        if strange:
            raise _refusal(
                strange,
                "class_names: expected words that the bundle's text encoder learned, got "
                f"{_quoted(strange)}. It knows: {', '.join(words)}.",
            )
        for phrase in phrases:
            if unknown := tokenizer.unknown_words(phrase):
                _log.warning(
                    "%r: the bundle's text encoder never learned %s; ignored",
                    phrase,
                    ", ".join(map(repr, unknown)),
                )

    def _unknown_message(self, phrases: Sequence[str]) -> str:
        per_name = 3 if len(phrases) == 1 else 1
        close = [name for phrase in phrases for name in self._close_names(phrase)[:per_name]]
        hint = f"Did you mean {_quoted(list(dict.fromkeys(close)))}? " if close else ""
        count = len(self._names.names)
        return (
            f"class_names: expected names from the bundle's text bank ({count} names), got "
            f"{_quoted(phrases)}. {hint}'zsseg-rt info BUNDLE --names' lists the bank. For any "
            "words, take a bundle with a text encoder: zsseg-rt fetch sfp-b16; or give embeddings=."
        )

    def _close_names(self, phrase: str) -> list[str]:
        """Names nearest by cosine to the mean row of a phrase's words; then those spelt alike."""
        names = self._names.names
        spelt = self._names.spelt_like(phrase, _MOST_CLOSE)
        words = [word for word in re.findall(r"\w+", phrase) if len(word) > 2]
        meant = {name for word in words if (name := self._names.find(word))} or set(spelt[:1])
        if not meant:
            return spelt
        rows = self._bank["embeds"]
        rows = unit_rows(np.where(rows.any(axis=1, keepdims=True), rows, 1.0))
        middle = rows[[self._places[name] for name in meant]].mean(axis=0)
        near = np.argsort(-(rows @ middle), kind="stable")[:_MOST_CLOSE]
        return list(dict.fromkeys([*(names[int(place)] for place in near), *spelt]))

    def _open_tokenizer(self, phrases: Sequence[str]) -> TokenRows:
        text = self._bundle.text
        if text.tokenizer is None or not self._has_encoder:
            raise _refusal(phrases, self._unknown_message(phrases))
        if self._tokenizer is None:
            path = self._bundle.open_path(text.tokenizer)
            kind = TOKENIZERS.get(path.name, Tokenizer)
            self._tokenizer = kind(path, context_length=text.context_length)
        return self._tokenizer

    def _inputs(self, tokens: npt.NDArray[np.int64], spec: TensorSpec) -> npt.NDArray[Any]:
        """The text encoder's input for token ids: these, or their rows of a table."""
        entry = self._bundle.text.token_rows
        if entry is None:
            return np.ascontiguousarray(tokens)
        if self._rows is None:
            self._rows = _read_rows(self._bundle.open_path(entry), self._tokenizer, spec)
        return self._rows[tokens].astype(np.float32)


def _read_rows(
    path: Path, tokenizer: TokenRows | None, spec: TensorSpec
) -> npt.NDArray[np.float16]:
    """A token table, which stays on the disk."""
    expected = (getattr(tokenizer, "vocab_size", None), spec.shape[-1])
    try:
        rows: npt.NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.dtype != np.float16 or rows.shape != expected:
            raise ValueError(f"{rows.dtype} {rows.shape}")
    except (OSError, ValueError, EOFError) as exc:
        raise BundleError(
            f"{path}: expected float16 rows {expected}, got {exc}. Copy it again, or export the "
            "bundle again."
        ) from exc
    return rows


def read_text_bank(bundle: Bundle) -> dict[str, npt.NDArray[np.float32]]:
    """Read the bundle's precomputed embeddings, float32 [C, D] by tensor; empty without a bank."""
    entry = bundle.text_bank
    if entry is None:
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path, expected = bundle.open_path(entry), (len(entry.names), bundle.text.embed_dim)
    try:
        bank = {name: rows.astype(np.float32) for name, rows in load_file(path).items()}
        shapes = {bank["embeds"].shape, *(rows.shape for rows in bank.values())}
    except (SafetensorError, KeyError, OSError) as exc:
        raise BundleError(f"{path}: expected a tensor 'embeds', got {exc}") from exc
    if shapes != {expected}:
        raise BundleError(f"{path}: embeds: expected shape {expected}, got {shapes}")
    return bank


def _row_cache(bundle: Bundle, cache_dir: Path | None) -> RowCache | None:
    """The bundle's part of the disk cache; None without a folder or a text encoder."""
    encoders, tokenizer = bundle.graphs.get("text_encoder"), bundle.text.tokenizer
    if cache_dir is None or not encoders or tokenizer is None:
        return None
    hashes = [*sorted(entry.sha256 for entry in encoders.values()), tokenizer.sha256]
    hashes += [entry.sha256 for entry in (bundle.text.token_rows,) if entry is not None]
    encoder = " ".join([*hashes, str(bundle.text.context_length), str(bundle.text.embed_dim)])
    return RowCache(cache_dir, encoder)


KEPT_ROWS = 65_536
"""Embeddings on disk of all encoders, 256 MB in blocks of 4 KB; of more, the oldest go."""
_MOST_ROW_BYTES = 1 << 20


class RowCache:
    """Embeddings in one folder each encoder under ``folder/text``; several processes may share it.

    Each process counts all files when it first writes, and again whenever it wrote an eighth of the
    most.
    """

    def __init__(self, folder: Path, encoder: str, *, max_rows: int = KEPT_ROWS) -> None:
        self._folder, self._max_rows = folder / "text", max_rows
        self._cache = Cache(self._folder / _digest(encoder), encoder)
        self._until_check = 0  # files to write before they are counted again

    def read(self, templates: str, phrase: str) -> npt.NDArray[np.float32] | None:
        """The embedding, float32 [D], for the templates of that key; None if it is missing."""
        entry = self._cache.read(f"{_digest(templates, phrase)}.row", max_bytes=_MOST_ROW_BYTES)
        return None if entry is None else np.frombuffer(entry.data, "<f4").astype(np.float32)

    def write(self, templates: str, rows: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Store the embeddings of some phrases; if that fails, warn once."""
        remark = "Text embeddings are kept in memory only."
        for phrase, row in rows.items():
            name, data = f"{_digest(templates, phrase)}.row", row.astype("<f4").tobytes()
            if not self._cache.keep(name, data, else_=remark):
                return
        self._until_check -= len(rows)
        if self._until_check <= 0:
            self._until_check = self._max_rows // 8
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        for space in self._folder.iterdir():
            remove_abandoned(space)
        with suppress(OSError):  # another process may have removed one
            rows = sorted(self._folder.glob("*/*.row"), key=lambda path: path.stat().st_mtime_ns)
            for path in rows[: -(self._max_rows * 7 // 8)] if len(rows) > self._max_rows else ():
                path.unlink(missing_ok=True)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def unit_rows(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The rows divided by their norms."""
    unit: npt.NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _refusal(unknown: Sequence[str], message: str) -> VocabularyError:
    error = VocabularyError(message)
    error.unknown = tuple(unknown)
    return error


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


_CLOSE = 0.75  # of difflib; below, suggestions are rarely what was meant
_ENDINGS = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"))


class BankNames:
    """Finds the name of a bank that a phrase stands for."""

    def __init__(self, names: Collection[str], *, folds: bool) -> None:
        self.names = tuple(names)
        self._exact = frozenset(names)
        self._plain = {plain(name): name for name in reversed(self.names)}
        self._keys = {_key(name): name for name in reversed(self.names)} if folds else {}

    def find(self, phrase: str) -> str | None:
        """The bank's name for a phrase; None if it has none."""
        if phrase in self._exact:
            return phrase
        name = self._plain.get(plain(phrase))
        if name is not None or not self._keys:
            return name
        table = _table()
        keys = (key for form in _forms(phrase) for key in (_key(form), *table.get(_key(form), ())))
        return next((self._keys[key] for key in keys if key in self._keys), None)

    def spelt_like(self, phrase: str, most: int) -> list[str]:
        """Names that are spelt like a phrase, or that have a synonym that is; the nearest first."""
        words = [*self._plain, *(_table() if self._keys else ())]
        close = difflib.get_close_matches(plain(phrase), words, n=most, cutoff=_CLOSE)
        names = (self.find(word) for word in close)
        return list(dict.fromkeys(name for name in names if name is not None))


def plain(name: str) -> str:
    """A name in small letters, with one space between words."""
    return " ".join(name.casefold().split())


def _forms(phrase: str) -> Iterator[str]:
    """The phrase, its singular and its plural; then those of what stands before a hyphen."""
    yield phrase
    yield from (phrase[: -len(old)] + new for old, new in _ENDINGS if phrase.lower().endswith(old))
    yield phrase + "s"
    head, hyphen, _ = phrase.partition("-")  # COCO-Stuff's wall-brick, building-other
    if hyphen and head:
        yield from _forms(head)


def _key(name: str) -> str:
    """The letters and digits of a name: ``tv-monitor`` and ``TV monitor`` are ``tvmonitor``."""
    return re.sub(r"[\W_]+", "", name.casefold())


@functools.cache
def _table() -> dict[str, tuple[str, ...]]:
    """For the key of each word, those of the names that it stands for, the nearest first."""
    table: dict[str, tuple[str, ...]] = {}
    text = Path(__file__).with_name("synonyms.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        same, _, narrower = line.partition(":")
        if line.startswith("#"):
            continue
        keys = tuple(map(_key, same.split("=")))
        for word in (*keys, *map(_key, narrower.split(","))):
            table[word] = table.get(word, ()) + keys
    table.pop("", None)
    return table


_MOST_LISTED = 20
# "animal" has 0.22 with sheep, "vehicle" 0.28 with boat; but "animal" also 0.30 with person.
_STANDS_FOR = 0.2


class VocabularyMaker:
    """Makes vocabularies of version 0; the text encoder is loaded at the first phrase it needs."""

    def __init__(
        self,
        bundle: Bundle,
        prompt_sets: Sequence[PromptSet],
        load_encoder: Callable[[], Session],
        *,
        cache_dir: Path | None,
        keep_encoder: bool,
    ) -> None:
        self._bundle, self._prompt_sets, self._keep_encoder = bundle, prompt_sets, keep_encoder
        self._embedder = PhraseEmbedder(bundle, load_encoder, cache_dir)
        self.release_encoder = self._embedder.release_encoder

    def check(self, vocabulary: Vocabulary) -> None:
        """Refuse a vocabulary that this bundle has no use for."""
        text, most = self._bundle.text, self._bundle.head.max_classes
        check_embeddings(vocabulary.embeds, len(vocabulary.phrases), text.embed_dim)
        if vocabulary.space and text.space and vocabulary.space != text.space:
            raise VocabularyError(
                f"class_names: expected a vocabulary of the text space {text.space!r}, got one of "
                f"{vocabulary.space!r}, whose rows fit but mean something else. Call set_classes "
                "with the names."
            )
        if len(vocabulary.phrases) > most:
            raise VocabularyError(
                f"class_names: expected a vocabulary of at most {most} phrases, got "
                f"{len(vocabulary.phrases)}. Name fewer, or export for more."
            )
        for prompt_set in self._prompt_sets[1:]:
            if prompt_set.name not in vocabulary.prompt_embeds:
                raise VocabularyError(
                    f"class_names: expected a vocabulary with embeddings for {prompt_set.name!r}, "
                    "got one of a bundle without them. Call set_classes with the names."
                )

    def read(
        self,
        class_names: ClassNames,
        background: Background,
        templates: Sequence[str] | None,
    ) -> ClassList:
        """The classes and their phrases, background included."""
        can_embed = partial(self._embedder.can_embed, with_bank=templates is None)
        concepts, meaning = self._bundle.concepts, self._embedder.meaning
        own = () if concepts is None else concepts.background
        if background is None:
            background = AUTO if own else ()
        read = partial(ClassList.read, max_phrases=self._bundle.head.max_classes, meaning=meaning)
        backdrop = read_background(background, class_names, can_embed, own)
        classes = read(class_names, backdrop)
        if background != AUTO:
            return classes
        if concepts is not None and own and backdrop:
            classes = read(class_names, [*backdrop, *self._unnamed(concepts, classes)])
        return replace(classes, auto_background=True)

    def embed(self, classes: ClassList, templates: Sequence[str] | None) -> Vocabulary:
        """A vocabulary whose phrases the bundle embeds."""
        templates = None if templates is None else check_templates(templates)
        embeds = [
            self._embedder.embed(classes.phrases, templates, prompt_set=prompt_set)
            for prompt_set in self._prompt_sets
        ]
        further = self._remarks_on_concepts(classes)
        if not self._keep_encoder:
            self._embedder.release_encoder()
        return self._made(classes, embeds, further, self._bundle.text.space)

    def with_embeddings(
        self, classes: ClassList, embeddings: npt.NDArray[np.float32]
    ) -> Vocabulary:
        """A vocabulary with embeddings of the caller's own, [P, D] or one for each prompt set."""
        sets, is_array = len(self._prompt_sets), isinstance(embeddings, np.ndarray)
        is_stack = is_array and embeddings.ndim == 3 and len(embeddings) == sets > 1
        parts = list(embeddings) if is_stack else [embeddings] * sets
        for part in parts:
            check_embeddings(part, len(classes.phrases), self._bundle.text.embed_dim)
        return self._made(classes, [np.array(part, order="C") for part in parts])

    def _made(
        self,
        classes: ClassList,
        embeds: Sequence[npt.NDArray[np.float32]],
        remarks: Sequence[str] = (),
        space: str = "",
    ) -> Vocabulary:
        further = zip(self._prompt_sets[1:], embeds[1:], strict=True)
        commas = (
            f"class_names: {phrase!r} is one name with a comma in it. Write each class or synonym "
            f"as its own text: {[part.strip() for part in phrase.split(',') if part.strip()]}."
            for phrase in classes.phrases
            if phrase.strip(" ,").count(",") and not self._embedder.banks(phrase)
        )
        remarks = (*commas, *self._remarks_on_shared_rows(classes), *remarks)
        for remark in remarks:
            _log.warning("%s", remark)
        return Vocabulary(
            names=classes.names,
            phrases=classes.phrases,
            phrase_classes=classes.phrase_classes,
            auto_background=classes.auto_background,
            embeds=embeds[0],
            version=0,
            prompt_embeds={prompt_set.name: rows for prompt_set, rows in further},
            remarks=remarks,
            space=space,
        )

    def _remarks_on_concepts(self, classes: ClassList) -> list[str]:
        """One for all names that are near nothing that was trained on, one for short ones."""
        spec, embed, meaning = self._bundle.concepts, self._embedder.embed, self._embedder.meaning
        if spec is None:
            return []
        trained = {*spec.names, *spec.also}
        asked = [
            phrase
            for phrase in dict.fromkeys(_asked(classes))
            if phrase not in spec.background and not {phrase, meaning(phrase)} & trained
        ]
        remarks = []
        short = [repr(phrase) for phrase in asked if len(phrase.split()) < spec.least_words]
        if short:
            remarks.append(
                f"class_names: {_listed(short)}: this model was trained on phrases of at least "
                f"{spec.least_words} words and takes a shorter one for many things. Its phrases: "
                f"{', '.join(spec.names)}."
            )
        far = []
        if spec.least_cosine is not None and asked:
            cosines = unit_rows(embed(asked)) @ unit_rows(embed(spec.names)).T
            far = [
                f"{phrase!r} (as background, all else)"
                if meaning(phrase) in spec.background
                else f"{phrase!r} (nearest: {spec.names[int(row.argmax())]})"
                for phrase, row in zip(asked, cosines, strict=True)
                if row.max() < spec.least_cosine
            ]
        if far:
            remarks.append(
                f"class_names: {_listed(far)}: this model was trained to see {len(spec.names)} "
                f"things and none of these. It sees: {', '.join(spec.names)}. For any words, fetch "
                "a CLIP bundle: zsseg-rt fetch sfp-b16."
            )
        return remarks

    def _remarks_on_shared_rows(self, classes: ClassList) -> Iterator[str]:
        """One for each name of the bank that several classes are looked for as."""
        asked: dict[str, dict[int, str]] = {}
        for phrase, owner in zip(classes.phrases, classes.phrase_classes.tolist(), strict=True):
            if owner >= 0 and self._embedder.banks(phrase):
                asked.setdefault(self._embedder.meaning(phrase), {}).setdefault(owner, phrase)
        for name, phrases in asked.items():
            if len(phrases) > 1:
                yield (
                    f"class_names: {_listed(list(map(repr, phrases.values())))}: this model looks "
                    f"for each of them as {name!r}, and the first takes the pixels of all."
                )

    def _unnamed(self, spec: ConceptSpec, classes: ClassList) -> list[str]:
        """The things that no class stands for, so that none is painted with the name of another.

        A class that is called as a thing stands for this thing alone. Any other phrase stands for
        all things that are nearer to it than to other phrases, by a cosine of at least 0.2.
        """
        if spec.least_cosine is None:
            return []
        embed, meaning = self._embedder.embed, self._embedder.meaning
        called = {meaning(phrase): phrase for phrase in _asked(classes)}
        things = {meaning(name): name for name in spec.names}
        rest = [name for key, name in things.items() if key not in called]
        if not rest or not called.keys() - things.keys():
            return rest
        cosines = unit_rows(embed(rest)) @ unit_rows(embed(list(called.values()))).T
        is_thing = np.array([key in things for key in called])
        alone = is_thing[cosines.argmax(1)] | (cosines.max(1) < _STANDS_FOR)
        return [name for name, nobodys in zip(rest, alone, strict=True) if nobodys]


def _asked(classes: ClassList) -> list[str]:
    """The phrases without those of the background."""
    owners = classes.phrase_classes.tolist()
    return [p for p, owner in zip(classes.phrases, owners, strict=True) if owner >= 0]


def _listed(phrases: Sequence[str]) -> str:
    more = len(phrases) - _MOST_LISTED
    return ", ".join(phrases[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
