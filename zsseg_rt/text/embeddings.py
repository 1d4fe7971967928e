"""Phrase embeddings: from the bundle's text bank, from memory, from disk, or from the encoder.

A phrase's embedding is the normalised mean of its prompts' normalised embeddings (Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, section 3.1.4).
"""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Session
from zsseg_rt.bundle import Bundle
from zsseg_rt.errors import BundleError, VocabularyError
from zsseg_rt.files import write_atomically
from zsseg_rt.text.prompts import fill, template_key
from zsseg_rt.text.tokenizer import Tokenizer, clean_text
from zsseg_rt.vocabulary import check_embeddings

__all__ = ["PhraseEmbedder", "read_embeddings", "read_text_bank"]

_log = logging.getLogger(__name__)
PROMPTS_PER_RUN = 16  # bounds the text encoder's activations: 16 x 77 tokens


class PhraseEmbedder:
    """Embeds phrases for one bundle; the text encoder is loaded at the first phrase that needs it.

    Args:
        bundle: Where the text bank, tokenizer and text encoder are.
        load_encoder: Loads the text encoder graph; called at most once until :meth:`close`.
        cache_dir: Folder for embeddings on disk; None keeps them in memory only.
    """

    def __init__(
        self, bundle: Bundle, load_encoder: Callable[[], Session], cache_dir: Path | None
    ) -> None:
        self._bundle = bundle
        self._load_encoder = load_encoder
        self._cache_dir = cache_dir
        self._bank = read_text_bank(bundle)
        self._region_bank = read_text_bank(bundle, "region_embeds")
        self._known: dict[tuple[str, str], npt.NDArray[np.float32]] = {}
        self._session: Session | None = None
        self._tokenizer: Tokenizer | None = None

    def embed(
        self, phrases: Sequence[str], templates: Sequence[str] | None = None
    ) -> npt.NDArray[np.float32]:
        """Embed phrases.

        Args:
            phrases: Texts to embed.
            templates: Prompts with one ``{}`` each; the bundle's if None. Given templates bypass
                the text bank, which holds embeddings of the bundle's own.

        Returns:
            float32 [len(phrases), D], unit rows (text-bank rows are as the bundle holds them).

        Raises:
            VocabularyError: The bundle has no text encoder and does not know a phrase.
        """
        used = tuple(templates or self._bundle.text.templates)
        return self._embed(phrases, used, {} if templates else self._bank)

    def embed_for_regions(
        self, phrases: Sequence[str], templates: Sequence[str] | None = None
    ) -> npt.NDArray[np.float32] | None:
        """As :meth:`embed`, with the prompts of the bundle's region encoder; None without one."""
        regions = self._bundle.regions
        if regions is None or regions.encoder is None:
            return None
        used = tuple(templates or regions.encoder.templates)
        return self._embed(phrases, used, {} if templates else self._region_bank)

    def _embed(
        self,
        phrases: Sequence[str],
        used: tuple[str, ...],
        bank: Mapping[str, npt.NDArray[np.float32]],
    ) -> npt.NDArray[np.float32]:
        key = template_key(used)
        missing = [p for p in phrases if p not in bank and not self._recall(key, p)]
        if missing:
            self._embed_missing(missing, used, key)
        rows = [bank[p] if p in bank else self._known[key, p] for p in phrases]
        return np.stack(rows).astype(np.float32, copy=False)

    def release_encoder(self) -> None:
        """Free the text encoder; it is loaded again when an unknown phrase comes."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _recall(self, key: str, phrase: str) -> bool:
        if (key, phrase) in self._known:
            return True
        path = self._cache_path(key, phrase)
        if path is None or not path.is_file():
            return False
        try:
            row = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as exc:
            _log.warning("%s: cached embedding is unreadable (%s); embedding again", path, exc)
            return False
        if (
            row.dtype != np.float32
            or row.shape != (self._bundle.text.embed_dim,)
            or not abs(float(np.linalg.norm(row.astype(np.float64))) - 1.0) < 1e-4
        ):
            _log.warning("%s: cached embedding has the wrong content; embedding again", path)
            return False
        self._known[key, phrase] = row
        return True

    def _embed_missing(self, phrases: list[str], templates: tuple[str, ...], key: str) -> None:
        tokenizer = self._open_tokenizer(phrases)
        for phrase in phrases:
            self._check_words(phrase, tokenizer)
        prompts = [prompt for phrase in phrases for prompt in fill(templates, phrase)]
        tokens = tokenizer.encode(prompts)
        session = self._open_session()
        name = session.inputs[0].name
        parts = []
        for start in range(0, len(tokens), PROMPTS_PER_RUN):
            batch = np.ascontiguousarray(tokens[start : start + PROMPTS_PER_RUN])
            parts.append(np.array(next(iter(session.run({name: batch}).values()))))
        embeds = _unit_rows(np.concatenate(parts).astype(np.float32))
        rows = _unit_rows(embeds.reshape(len(phrases), len(templates), -1).mean(axis=1))
        for phrase, row in zip(phrases, rows, strict=True):
            self._known[key, phrase] = row
            self._remember(key, phrase, row)

    def _remember(self, key: str, phrase: str, row: npt.NDArray[np.float32]) -> None:
        path = self._cache_path(key, phrase)
        if path is None:
            return
        content = io.BytesIO()
        np.save(content, row, allow_pickle=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getvalue())
        except OSError as exc:
            _log.warning(
                "text embeddings are kept in memory only, %s cannot be written: %s", path, exc
            )

    def _cache_path(self, key: str, phrase: str) -> Path | None:
        encoder = self._bundle.text.encoder_sha256
        if self._cache_dir is None or encoder is None:
            return None
        name = hashlib.sha256(phrase.encode()).hexdigest()[:32]
        return self._cache_dir / "text" / f"{encoder[:16]}-{key}" / f"{name}.npy"

    def _check_words(self, phrase: str, tokenizer: Tokenizer) -> None:
        """Refuse a phrase of which the text encoder knows nothing; say what it does not know.

        Raises:
            VocabularyError: No word of the phrase is among the bundle's.
        """
        words = self._bundle.text.words
        if not words:
            return
        if not set(words) & set(re.findall(r"\w+", clean_text(phrase))):
            raise VocabularyError(
                f"class_names: expected words that the bundle's text encoder learned, got "
                f"{phrase!r}. It knows: {', '.join(words)}."
            )
        unknown = tokenizer.unknown_words(phrase)
        if unknown:
            _log.warning(
                "%r: the bundle's text encoder never learned %s; left out",
                phrase,
                ", ".join(map(repr, unknown)),
            )

    def _open_session(self) -> Session:
        if self._session is None:
            self._session = self._load_encoder()
        return self._session

    def _open_tokenizer(self, phrases: Sequence[str]) -> Tokenizer:
        text = self._bundle.text
        if text.tokenizer is None or "text_encoder" not in self._bundle.graphs:
            raise VocabularyError(_unknown_phrase_message(phrases[0], list(self._bank)))
        if self._tokenizer is None:
            path = self._bundle.open_path(text.tokenizer)
            self._tokenizer = Tokenizer(path, context_length=text.context_length)
        return self._tokenizer


def read_embeddings(
    embeddings: npt.NDArray[np.float32], count: int, bundle: Bundle
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Copy a caller's embeddings after checking them.

    Args:
        embeddings: float32 [count, D]; for a bundle with a region encoder also [2, count, D], the
            segments' and the regions'.
        count: Phrases.
        bundle: Says D and whether there is a region encoder.

    Returns:
        Embeddings [count, D] of the segments, and of the regions or None.

    Raises:
        DTypeError: Not float32.
        ShapeError: Another shape.
        VocabularyError: NaN, infinity or a row of zeros.
    """
    regions, parts = bundle.regions, [embeddings]
    if regions is not None and regions.encoder is not None:
        is_pair = isinstance(embeddings, np.ndarray) and embeddings.ndim == 3
        parts = list(embeddings) if is_pair and len(embeddings) == 2 else [embeddings] * 2
    for part in parts:
        check_embeddings(part, count, bundle.text.embed_dim)
    copies = [np.array(part, order="C") for part in parts]
    return copies[0], copies[1] if len(copies) == 2 else None


def read_text_bank(bundle: Bundle, tensor: str = "embeds") -> dict[str, npt.NDArray[np.float32]]:
    """Read the bundle's precomputed embeddings, one float32 [D] a name; empty without a bank.

    Args:
        bundle: The bundle.
        tensor: ``"embeds"``, or ``"region_embeds"`` for the region encoder's prompts; a bank
            without the latter serves both.

    Raises:
        BundleError: The file does not hold ``embeds`` [C, D] for the names.
    """
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


def _unit_rows(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    unit: npt.NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _unknown_phrase_message(phrase: str, known: list[str]) -> str:
    close = difflib.get_close_matches(phrase, known, n=3)
    hint = f"Did you mean {', '.join(map(repr, close))}? " if close else ""
    return (
        f"class_names: expected a name from the bundle's text bank ({len(known)} names), got "
        f"{phrase!r}; the bundle has no text encoder. {hint}Give embeddings=, or export the bundle "
        "with a text encoder. 'zsseg-rt info BUNDLE --names' lists the bank."
    )
