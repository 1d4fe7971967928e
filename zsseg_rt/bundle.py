"""A bundle: a folder ``NAME.zsseg`` with graphs, text side, settings and a golden sample.

``bundle.json`` describes every other file with its size and SHA-256. A reader accepts every older
``format_version`` and refuses a newer one; an unknown key, a missing file, a wrong hash or a path
that leaves the folder is a :class:`BundleError` that names key and file. There are no pickles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from zsseg_rt import schema
from zsseg_rt.backends.base import TensorSpec
from zsseg_rt.errors import BundleError, BundleVersionError, PrecisionNotApplied
from zsseg_rt.files import sha256_of
from zsseg_rt.region_spec import RegionSpec

__all__ = [
    "FAMILIES",
    "FORMAT_VERSION",
    "Bundle",
    "FileEntry",
    "GraphEntry",
    "HeadSpec",
    "PreprocessSpec",
    "SegmentSpec",
    "TextBankEntry",
    "TextSpec",
]

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
FAMILIES = {
    "descriptor": ("image_encoder", "decoder"),
    "dense": ("image_encoder",),
    "segment_tokens": ("image_encoder",),
    "proposals": ("image_encoder",),
}
ACTIVATIONS = ("none", "sigmoid", "softmax")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of the bundle: relative path, SHA-256 (hex) and size in bytes."""

    file: str
    sha256: str
    bytes: int

    @classmethod
    def describe(cls, path: Path, root: Path) -> FileEntry:
        """Describe a file that lies under ``root``."""
        return FileEntry(
            file=path.relative_to(root).as_posix(),
            sha256=sha256_of(path),
            bytes=path.stat().st_size,
        )


@dataclass(frozen=True, kw_only=True)
class GraphEntry(FileEntry):
    """One ONNX graph in one precision, with its inputs and outputs."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """How a frame becomes the encoder's input.

    Attributes:
        size_hw: Encoder input size (height, width) in pixels.
        mean: Per-channel mean of RGB in 0..1.
        std: Per-channel standard deviation of RGB in 0..1.
        resize: ``"stretch"``: the whole frame is resized to ``size_hw``.
    """

    size_hw: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "stretch"

    def __post_init__(self) -> None:
        if min(self.size_hw) < 1:
            raise ValueError(f"size_hw: expected sizes >= 1, got {self.size_hw}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected values > 0, got {self.std}")
        if self.resize != "stretch":
            raise ValueError(f"resize: expected 'stretch', got {self.resize!r}")


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """The text side: width of the space, prompt templates, tokenizer.

    Attributes:
        embed_dim: Width D of class embeddings.
        templates: Prompts with one ``{}`` each; a name's embedding is their normalised mean.
        template_set: A short name of the templates, for people.
        context_length: Tokens a prompt.
        tokenizer: ``tokenizer.json`` or None if the bundle has no text encoder.
        encoder_sha256: SHA-256 of the float32 text graph; identifies cached embeddings.
        space: Which joint space the embeddings live in, for people.
        words: What class names may be made of, where the text encoder was trained on few words; a
            name without any of them is refused. Empty: anything.
    """

    embed_dim: int
    templates: tuple[str, ...]
    template_set: str = "custom"
    context_length: int = 77
    tokenizer: FileEntry | None = None
    encoder_sha256: str | None = None
    space: str = ""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for word in self.words:
            if not word or word != word.lower() or word.split() != [word]:
                raise ValueError(f"words: expected single lower-case words, got {word!r}")
        if not self.templates:
            raise ValueError("templates: expected at least one, got none")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates: expected one '{{}}' in each, got {template!r}")


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """How features and class embeddings become labels.

    Attributes:
        logit_scale: Multiplies the similarity.
        normalize: True for cosine similarity, False for a plain dot product.
        activation: ``"none"``, ``"sigmoid"`` or ``"softmax"`` over classes, after upsampling.
        grid_hw: Low-resolution grid (height, width) of the patches.
        seen: Names of the classes that training saw.
        seen_bias: Subtracted from the activated value of seen classes.
        unknown_below: Default score under which a pixel is unknown; None keeps every pixel.
        max_classes: Largest class axis the graphs accept.
    """

    logit_scale: float
    normalize: bool
    activation: str
    grid_hw: tuple[int, int]
    seen: tuple[str, ...] = ()
    seen_bias: float = 0.0
    unknown_below: float | None = None
    max_classes: int = 1024

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {self.activation!r}")
        if min(self.grid_hw) < 1:
            raise ValueError(f"grid_hw: expected sizes >= 1, got {self.grid_hw}")
        if not math.isfinite(self.seen_bias):
            raise ValueError(f"seen_bias: expected a finite number, got {self.seen_bias}")
        if self.unknown_below is not None and not 0.0 <= self.unknown_below <= 1.0:
            raise ValueError(
                f"unknown_below: expected a score in [0, 1] or null, got {self.unknown_below}"
            )


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """How segments take classes, in the family ``segment_tokens``.

    The scale is :attr:`HeadSpec.logit_scale`; :attr:`HeadSpec.unknown_below` is the background
    threshold, under which a segment is unknown unless it is the frame's best.

    Attributes:
        num_segments: Segments G of a frame.
        top_k: Phrases that survive: those nearest to the whole frame. None keeps all.
        plain_cosine: Whether scores are the bare softmax over all phrases.
    """

    num_segments: int
    top_k: int | None = 5
    plain_cosine: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_segments <= 254:
            raise ValueError(f"num_segments: expected from 1 to 254, got {self.num_segments}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1 or null, got {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class TextBankEntry(FileEntry):
    """Precomputed embeddings ``embeds`` float32 [C, D] of ``names``, in a safetensors file.

    Where a bundle embeds names with two sets of prompts, ``region_embeds`` [C, D] beside them.
    """

    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    format_version: int
    name: str
    family: str
    architecture: str
    graphs: dict[str, dict[str, GraphEntry]]
    preprocess: PreprocessSpec
    text: TextSpec
    head: HeadSpec
    segments: SegmentSpec | None = None
    regions: RegionSpec | None = None
    weights: FileEntry | None = None
    text_bank: TextBankEntry | None = None
    golden: FileEntry | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    licence: str = ""


@dataclass(frozen=True, kw_only=True)
class Bundle(_Manifest):
    """A bundle on disk, read and checked; files are hashed when they are opened.

    Example:
        >>> bundle = Bundle.load("street.zsseg")  # doctest: +SKIP
        >>> bundle.name, bundle.family  # doctest: +SKIP
        ('street', 'descriptor')
    """

    path: Path

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read ``bundle.json`` and check that every file is there with the right size.

        Raises:
            BundleVersionError: The format is newer than this package reads.
            BundleError: Not a bundle, or incomplete, altered, or with a path that leaves it.
        """
        root = Path(path)
        manifest = _read_manifest(root)
        bundle = cls(path=root, **{k: getattr(manifest, k) for k in _Manifest.__dataclass_fields__})
        bundle._check_family()
        for entry in bundle.files():
            bundle._locate(entry)
        return bundle

    def files(self) -> Iterator[FileEntry]:
        """Every file that ``bundle.json`` names."""
        for variants in self.graphs.values():
            yield from variants.values()
        for entry in (self.weights, self.text.tokenizer, self.text_bank, self.golden):
            if entry is not None:
                yield entry

    def verify(self) -> None:
        """Hash every file.

        Raises:
            BundleError: A file's content is not what ``bundle.json`` says.
        """
        for entry in self.files():
            self.open_path(entry)

    def open_path(self, entry: FileEntry) -> Path:
        """Return a file's path after checking its hash.

        Raises:
            BundleError: The file is missing or its content was altered.
        """
        location = self._locate(entry)
        found = sha256_of(location)
        if found != entry.sha256:
            raise BundleError(
                f"{location}: expected sha256 {entry.sha256[:12]}..., got {found[:12]}.... "
                "The file was altered or damaged; copy the bundle again."
            )
        return location

    def graph(self, name: str, precision: str) -> GraphEntry:
        """Return the graph that serves a precision.

        ``"float32"``, ``"bfloat16"`` and ``"auto"`` are served by the float32 graph when there is
        one (a backend lowers it), every other precision by a graph of its own.

        Raises:
            BundleError: The bundle has no such graph.
            PrecisionNotApplied: The bundle has no graph that serves the precision.
        """
        variants = self.graphs.get(name)
        if not variants:
            raise BundleError(f"{self.path / MANIFEST}: graphs: missing key {name!r}")
        wanted = "float32" if precision in ("auto", "bfloat16") else precision
        if wanted in variants:
            return variants[wanted]
        if precision == "auto":
            return next(iter(variants.values()))
        raise PrecisionNotApplied(
            f"precision: expected one that {self.path.name} holds for {name} "
            f"({', '.join(variants)}), got {precision!r}. Export the bundle with that precision."
        )

    def to_manifest(self) -> dict[str, Any]:
        """The content of ``bundle.json`` as plain data."""
        data: dict[str, Any] = schema.encode(self)
        del data["path"]
        if self.segments is None:  # readers of the first 0.1 bundles know no such key
            del data["segments"]
        if self.regions is None:
            del data["regions"]
        return data

    def _locate(self, entry: FileEntry) -> Path:
        relative = PurePosixPath(entry.file)
        where = self.path / MANIFEST
        if relative.is_absolute() or ".." in relative.parts or "\\" in entry.file:
            raise BundleError(
                f"{where}: file: expected a path inside the bundle, got {entry.file!r}. "
                "Do not use bundles from people you do not trust."
            )
        location = self.path / relative
        if not location.is_file():
            raise BundleError(f"{location}: file named in {MANIFEST} is missing. Copy it again.")
        if not location.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(
                f"{location}: expected a file inside the bundle, got a link out of it"
            )
        size = location.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{location}: expected {entry.bytes} bytes, got {size}. Copy the bundle again."
            )
        return location

    def _check_family(self) -> None:
        where = self.path / MANIFEST
        if self.family not in FAMILIES:
            raise BundleError(
                f"{where}: family: expected one of {', '.join(FAMILIES)}, got {self.family!r}. "
                "Update zsseg_rt if the bundle comes from a newer version."
            )
        for name in FAMILIES[self.family]:
            if not self.graphs.get(name):
                raise BundleError(f"{where}: graphs: missing key {name!r}")
        if self.family == "descriptor" and self.weights is None:
            raise BundleError(f"{where}: missing key 'weights'")
        if self.family == "segment_tokens" and self.segments is None:
            raise BundleError(f"{where}: missing key 'segments'")
        if self.family == "proposals":
            self._check_regions(where)

    def _check_regions(self, where: Path) -> None:
        if self.regions is None:
            raise BundleError(f"{where}: missing key 'regions'")
        if self.regions.encoder is not None and not self.graphs.get("region_encoder"):
            raise BundleError(f"{where}: graphs: missing key 'region_encoder'")


def _read_manifest(root: Path) -> _Manifest:
    where = root / MANIFEST
    if not root.exists():
        raise BundleError(f"{root}: expected a bundle folder, found nothing. Check the path.")
    if not where.is_file():
        raise BundleError(f"{root}: expected a bundle folder with {MANIFEST}, found none in it.")
    try:
        raw = json.loads(where.read_text(encoding="utf-8"))
    except (ValueError, OSError) as exc:
        raise BundleError(f"{where}: expected JSON, got {exc}. Copy the bundle again.") from exc
    version = raw.get("format_version") if isinstance(raw, Mapping) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{where}: format_version: expected an integer >= 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise BundleVersionError(
            f"{where}: format_version: expected <= {FORMAT_VERSION}, got {version}. "
            "Update zsseg_rt."
        )
    return schema.decode(_Manifest, raw, str(where), BundleError)
