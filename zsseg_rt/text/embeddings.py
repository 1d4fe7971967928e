"""Phrase embeddings: from the bundle's text bank, from memory, from disk, or from the encoder.

A phrase's embedding is the normalised mean of its prompts' normalised embeddings (Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section 3.1.4).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.common.files import Cache, remove_abandoned, remove_entry
from zsseg_rt.errors import BundleError, VocabularyError
from zsseg_rt.text.piece_tokenizer import (
    GEMMA_FILE,
    PIECES_FILE,
    GemmaTokenizer,
    PieceTokenizer,
)
from zsseg_rt.text.tokenizer import Tokenizer, clean_text
from zsseg_rt.text.vocabulary import PromptSet, check_embeddings, fill, template_key

_log = logging.getLogger(__name__)
AnyTokenizer = Tokenizer | PieceTokenizer | GemmaTokenizer
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
        self._banks: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
        self._known: dict[tuple[str, str], npt.NDArray[np.float32]] = {}
        self._session: Session | None = None
        self._tokenizer: AnyTokenizer | None = None
        self._rows: npt.NDArray[np.float16] | None = None
        entry = bundle.text_bank
        self._names = BankNames(() if entry is None else entry.names, folds=not self._has_encoder)
        self._bank(PromptSet.bank)  # a damaged bank is refused here, not at the first name

    def embed(
        self,
        phrases: Sequence[str],
        templates: Sequence[str] | None = None,
        *,
        prompt_set: PromptSet | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embed phrases.

        Returns:
            float32 [len(phrases), D], unit rows (text-bank rows are as the bundle holds them).
        """
        prompts = prompt_set or PromptSet(templates=self._bundle.text.templates)
        used = tuple(templates or prompts.templates)
        bank = {} if templates else self._bank(prompts.bank)
        key = template_key(used)
        banked = {p: bank[name] for p in phrases if (name := self._names.find(p)) in bank}
        asked = dict.fromkeys(p for p in phrases if p not in banked)
        by_phrase = {p: row for p in asked if (row := self._recall(key, p)) is not None}
        missing = [p for p in asked if p not in by_phrase]
        if missing:
            by_phrase |= self._embed_missing(missing, used, key)
        self._keep(key, by_phrase)
        rows = [banked[p] if p in banked else by_phrase[p] for p in phrases]
        return np.stack(rows).astype(np.float32, copy=False)

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

    def _bank(self, tensor: str) -> dict[str, npt.NDArray[np.float32]]:
        if tensor not in self._banks:
            self._banks[tensor] = read_text_bank(self._bundle, tensor)
        return self._banks[tensor]

    def release_encoder(self) -> None:
        """Free the text encoder; it is loaded again for the next new phrase."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _recall(self, key: str, phrase: str) -> npt.NDArray[np.float32] | None:
        row = self._known.get((key, phrase))
        if row is not None or self._stored is None:
            return row
        return self._stored.read(key, phrase)

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
        session = self._open_session()
        spec = session.inputs[0]
        parts = []
        for start in range(0, len(tokens), PROMPTS_PER_RUN):
            batch = self._inputs(tokens[start : start + PROMPTS_PER_RUN], spec)
            parts.append(np.array(next(iter(session.run({spec.name: batch}).values()))))
        embeds = unit_rows(np.concatenate(parts).astype(np.float32))
        rows = unit_rows(embeds.reshape(len(phrases), len(templates), -1).mean(axis=1))
        embedded = {phrase: row.copy() for phrase, row in zip(phrases, rows, strict=True)}
        if self._stored is not None:
            self._stored.write(key, embedded)
        return embedded

    def _check_words(self, phrases: Sequence[str], tokenizer: AnyTokenizer) -> None:
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

    def _open_session(self) -> Session:
        if self._session is None:
            self._session = self._load_encoder()
        return self._session

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
        names, bank = self._names.names, self._bank(PromptSet.bank)
        spelt = self._names.spelt_like(phrase, _MOST_CLOSE)
        words = [word for word in re.findall(r"\w+", phrase) if len(word) > 2]
        meant = {name for word in words if (name := self._names.find(word))} or set(spelt[:1])
        if not meant:
            return spelt
        rows = np.stack([bank[name] for name in names])
        rows = unit_rows(np.where(rows.any(axis=1, keepdims=True), rows, 1.0))
        middle = unit_rows(np.stack([bank[name] for name in meant])).mean(axis=0)
        near = np.argsort(-(rows @ middle), kind="stable")[:_MOST_CLOSE]
        return list(dict.fromkeys([*(names[int(place)] for place in near), *spelt]))

    def _open_tokenizer(self, phrases: Sequence[str]) -> AnyTokenizer:
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
    path: Path, tokenizer: AnyTokenizer | None, spec: TensorSpec
) -> npt.NDArray[np.float16]:
    """A token table, which stays on the disk."""
    expected = (getattr(tokenizer, "vocab_size", None), spec.shape[-1])
    try:
        rows: npt.NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise BundleError(f"{path}: expected rows of tokens, got {exc}. Copy it again.") from exc
    if rows.dtype != np.float16 or rows.shape != expected:
        raise BundleError(
            f"{path}: expected float16 rows {expected}, got {rows.dtype} {rows.shape}. Export the "
            "bundle again."
        )
    return rows


def read_embeddings(
    embeddings: npt.NDArray[np.float32], count: int, embed_dim: int, num_sets: int
) -> list[npt.NDArray[np.float32]]:
    """Copy a caller's embeddings after checking them.

    Shapes:
        embeddings: float32 [count, D], which serves for every prompt set; or [num_sets, count, D].

    Returns:
        One array [count, D] per prompt set.
    """
    is_stack = isinstance(embeddings, np.ndarray) and embeddings.ndim == 3
    parts = list(embeddings) if is_stack and len(embeddings) == num_sets > 1 else [embeddings]
    for part in parts:
        check_embeddings(part, count, embed_dim)
    if len(parts) < num_sets:
        parts *= num_sets
    return [np.array(part, order="C") for part in parts]


def read_text_bank(bundle: Bundle, tensor: str = "embeds") -> dict[str, npt.NDArray[np.float32]]:
    """Read the bundle's precomputed embeddings, one float32 [D] per name; empty without a bank."""
    entry = bundle.text_bank
    if entry is None:
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = bundle.open_path(entry)
    try:
        tensors = load_file(path)
        embeds = tensors.get(tensor, tensors["embeds"]).astype(np.float32)
    except (SafetensorError, KeyError, OSError) as exc:
        raise BundleError(f"{path}: expected a tensor 'embeds', got {exc}") from exc
    if embeds.shape != (len(entry.names), bundle.text.embed_dim):
        raise BundleError(
            f"{path}: embeds: expected shape ({len(entry.names)}, {bundle.text.embed_dim}), "
            f"got {embeds.shape}"
        )
    return dict(zip(entry.names, embeds, strict=True))


def _row_cache(bundle: Bundle, cache_dir: Path | None) -> RowCache | None:
    """The bundle's part of the disk cache; None without a folder or a text encoder."""
    encoders, tokenizer = bundle.graphs.get("text_encoder"), bundle.text.tokenizer
    if cache_dir is None or not encoders or tokenizer is None:
        return None
    hashes = [*sorted(entry.sha256 for entry in encoders.values()), tokenizer.sha256]
    hashes += [entry.sha256 for entry in (bundle.text.token_rows,) if entry is not None]
    encoder = " ".join([*hashes, str(bundle.text.context_length), str(bundle.text.embed_dim)])
    return RowCache(cache_dir, encoder, bundle.text.embed_dim)


KEPT_ROWS = 65_536
"""Embeddings on disk of all encoders, 256 MB in blocks of 4 KB; the least recently used go.

Each process counts them when it first writes, and again whenever it wrote an eighth of that. If
there are more, they are cut to seven eighths.
"""


class RowCache:
    """Embeddings under ``folder/text``; several processes may share it.

    The checksum in each file covers encoder, templates, phrase and row, so neither an altered file
    nor one made for another phrase is mistaken for the embedding. A file's time of change is that
    of its last use.
    """

    def __init__(
        self, folder: Path, encoder: str, embed_dim: int, *, max_rows: int = KEPT_ROWS
    ) -> None:
        self._max_rows = max_rows
        self._until_check = 0  # files to write before they are counted again
        self._folder, self._encoder, self._embed_dim = folder / "text", encoder, embed_dim

    def path(self, templates: str, phrase: str) -> Path:
        """Where the embedding of a phrase with the templates of that key is or would be stored."""
        return self._rows(templates).folder / f"{_sha256(phrase)}.row"

    def read(self, templates: str, phrase: str) -> npt.NDArray[np.float32] | None:
        """A stored embedding, float32 [D]; None if it is missing or damaged.

        A damaged file is removed and reported as a warning.
        """
        rows, name = self._rows(templates), f"{_sha256(phrase)}.row"
        entry = rows.read(name, max_bytes=4 * self._embed_dim)
        if entry is None:
            return None
        row = np.frombuffer(entry.data, "<f4").astype(np.float32)
        if not abs(float(np.linalg.norm(row.astype(np.float64))) - 1.0) < 1e-4:
            rows.discard(name, "is not of unit length")
            return None
        with suppress(OSError):  # a folder that may only be read still serves
            os.utime(rows.folder / name)
        return row

    def write(self, templates: str, rows: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Store the embeddings of some phrases; if that fails, warn once."""
        cache, remark = self._rows(templates), "Text embeddings are kept in memory only."
        for phrase, row in rows.items():
            if not cache.keep(f"{_sha256(phrase)}.row", row.astype("<f4").tobytes(), else_=remark):
                return
        self._until_check -= len(rows)
        if self._until_check <= 0:
            self._until_check = self._max_rows // 8
            self._drop_oldest()

    def _rows(self, templates: str) -> Cache:
        space = _sha256(self._encoder, templates)
        return Cache(self._folder / space, space)

    def _drop_oldest(self) -> None:
        try:
            used = sorted(_last_uses(self._folder))
            if len(used) <= self._max_rows:
                return
            for _, path in used[: len(used) - self._max_rows * 7 // 8]:
                remove_entry(path)
        except OSError as exc:
            _log.warning("%s: old text embeddings cannot be removed: %s", self._folder, exc)


def _last_uses(folder: Path) -> Iterator[tuple[int, Path]]:
    """When each file of the cache was last used, in ns; files that others remove are left out."""
    for space in folder.iterdir():
        if space.is_symlink() or not space.is_dir():
            continue
        remove_abandoned(space)
        with suppress(FileNotFoundError), os.scandir(space) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name.endswith(".row"):
                        yield entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)


def _sha256(*parts: str) -> str:
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
