"""The sections of ``bundle.json``: files, preprocessing, text, how labels are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.common.checks import check_choice, check_range
from zsseg_rt.common.files import sha256_of
from zsseg_rt.common.schema import check_plain_text, without_retired

MAX_WIDTH = 1 << 16  # of images, grids and embeddings
MAX_CLASSES = 65534  # labels have 16 bits, and one of them is unknown
ACTIVATIONS = ("none", "sigmoid", "softmax")
FUSIONS = ("seen_and_unseen", "all_classes", "regions", "segments")
ALIGNS = ("half_pixel", "corners")
STYLES = ("cropmask", "mask", "crop")


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """Requirements of the format on a family's bundles, and the settings that they have."""

    graphs: tuple[str, ...] = ("image_encoder",)  # Graphs that a bundle must hold
    keys: tuple[str, ...] = ()  # Further keys of bundle.json that it must hold
    # Inputs and outputs of graphs that may be in half precision: read or written by kernels that
    # take it. All others are float32 in graphs of every precision
    half_tensors: tuple[str, ...] = ("image",)
    # Optional settings of EngineConfig that the family reads; others are refused
    settings: tuple[str, ...] = ()
    # Whether masks are logits of classes, which a FrameMemory can blend
    has_class_logits: bool = False


FAMILIES: dict[str, FamilySpec] = {
    "aggregation": FamilySpec(
        graphs=("image_encoder", "head"),
        keys=("weights", "aggregation"),
        settings=("head_classes", "max_candidates"),
        has_class_logits=True,
    ),
    "descriptor": FamilySpec(
        graphs=("image_encoder", "decoder"),
        keys=("weights",),
        half_tensors=(
            "image",
            "patch_embeds",
            "cls_embed",
            "queries",
            "class_embeds",
            "patch_keys",
        ),
        settings=("max_candidates", "resize", "windows"),
        has_class_logits=True,
    ),
    "dense": FamilySpec(
        half_tensors=("image", "patch_embeds"),
        settings=("max_candidates", "resize", "windows"),
        has_class_logits=True,
    ),
    "segment_tokens": FamilySpec(keys=("segments",)),
    "proposals": FamilySpec(keys=("regions",), half_tensors=(), settings=("min_region_score",)),
}
"""All that is known of a family outside its file; ``families/registry.py`` names its class."""


def family_settings() -> tuple[str, ...]:
    """Settings of ``EngineConfig`` that only some families have; None keeps the bundle's value."""
    return tuple(sorted({name for family in FAMILIES.values() for name in family.settings}))


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
    """How a frame becomes the encoder's input."""

    size_hw: tuple[int, int]  # Encoder input size (height, width) in pixels
    mean: tuple[float, float, float]  # Per-channel mean of RGB in 0..1
    std: tuple[float, float, float]  # Per-channel standard deviation of RGB in 0..1
    # What an engine does that is told neither windows nor resize. "stretch": the whole frame is
    # resized to size_hw. "windows": as windows="auto"
    resize: str = "stretch"

    def __post_init__(self) -> None:
        check_range(self, "size_hw", least=1, most=MAX_WIDTH)
        _check_std(self.std)
        check_choice("resize", self.resize, ("stretch", "windows"))


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """The text side: width of the space, prompt templates, tokenizer."""

    embed_dim: int  # Width D of class embeddings
    # Prompts with one {} each; a name's embedding is their normalised mean
    templates: tuple[str, ...]
    template_set: str = "custom"  # A short human-readable name of the templates
    context_length: int = 77  # Tokens per prompt
    # tokenizer.json, tokenizer.model for SentencePiece, or gemma.json; None if the bundle has no
    # text encoder
    tokenizer: FileEntry | None = None
    # The token table, float16 in an .npy file, of a text encoder that takes token_embeds float32
    # [prompts, L, W] instead of token_ids; it stays on the disk
    token_rows: FileEntry | None = None
    encoder_sha256: str | None = None  # SHA-256 of the float32 text graph, as information only
    # Which joint space the embeddings live in; a vocabulary of another one is refused where both
    # are stated
    space: str = ""
    # The words class names may use, if the text encoder was trained on few words; a name without
    # any of them is refused. Empty: any words
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range(self, "embed_dim", least=1, most=MAX_WIDTH)
        check_range(self, "context_length", least=2, most=MAX_WIDTH)
        for word in self.words:
            if not word or word != word.lower() or word.split() != [word]:
                raise ValueError(f"words: expected single lower-case words, got {word!r}")
        _check_templates(self.templates)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """How features and class embeddings become labels."""

    logit_scale: float  # Multiplies the similarity
    normalize: bool  # True for cosine similarity, False for a plain dot product
    activation: str  # "none", "sigmoid" or "softmax" over classes, after upsampling
    grid_hw: tuple[int, int]  # Low-resolution grid (height, width) of the patches
    seen: tuple[str, ...] = ()  # Names of the classes that training saw
    seen_bias: float = 0.0  # Subtracted from the activated value of seen classes
    # Default score below which a pixel is unknown; None keeps every pixel
    unknown_below: float | None = None
    max_classes: int = 1024  # Largest class axis the graphs accept
    # Whether the decoder treats every class query by itself, in family descriptor; None: not stated
    independent_queries: bool | None = None
    # Where the grid's cells lie on the frame. "half_pixel": each is the centre of its share.
    # "corners": the first and last lie on the corners, as in networks for 16 n + 1 pixels; so do
    # the pixels of the encoder's input
    align: str = "half_pixel"

    @staticmethod
    def from_earlier(raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Refuse masks blended with cosines, and graphs that take several windows at once."""
        again = "Export the bundle again."
        raw = {key: value for key, value in raw.items() if (key, value) != ("window_batch", 1)}
        return without_retired(raw, {"cosine": again, "window_batch": again})

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("align", self.align, ALIGNS)
        check_range(self, "logit_scale", least=1e-9)
        check_range(self, "grid_hw", least=1, most=MAX_WIDTH)
        _check_names("seen", self.seen)
        check_range(self, "max_classes", least=1, most=MAX_CLASSES)
        check_range(self, "seen_bias", least=-math.inf)
        check_range(self, "unknown_below", most=1.0)


@dataclass(frozen=True, kw_only=True)
class SegmentSpec:
    """How segments get classes, in the family ``segment_tokens``.

    :attr:`HeadSpec.unknown_below` is the score below which all but the frame's best are unknown.
    """

    num_segments: int  # Number of segments per frame, G
    # How many phrases survive, the nearest to the whole frame. None keeps all
    top_k: int | None = 5
    plain_cosine: bool = False  # Whether scores are the bare softmax over all phrases

    def __post_init__(self) -> None:
        check_range(self, "num_segments", least=1, most=254)
        check_range(self, "top_k", least=1)


@dataclass(frozen=True, kw_only=True)
class AggregationSpec:
    """How classes attend to each other, in the family ``aggregation``."""

    padding: int  # Classes that shorter vocabularies are padded to with copies of a learned token
    # Phrases that the head takes at once; of more, it looks at those with the largest correlation
    # anywhere in the frame. None: as many as head.max_classes
    most: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "most", least=1, most=MAX_CLASSES)
        check_range(self, "padding", most=MAX_CLASSES)


@dataclass(frozen=True, kw_only=True)
class TextBankEntry(FileEntry):
    """Rows ``embeds`` [C, D] of ``names``, and ``region_embeds`` [C, D] of a second prompt set."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_names("names", self.names)


@dataclass(frozen=True, kw_only=True)
class RegionEncoderSpec:
    """The crops of segments that a second network, CLIP, is shown, and how it is asked."""

    side: int  # Side of a crop in pixels
    batch: int  # Most crops that are cut out and encoded at once
    style: str  # What is shown: "cropmask", "mask" or "crop"; see :func:`zsseg_rt.ops.crop_regions`
    mean: tuple[float, float, float]  # Per-channel mean of RGB in 0..1
    std: tuple[float, float, float]  # Per-channel standard deviation of RGB in 0..1
    logit_scale: float  # Multiplies the cosine of regions and classes
    templates: tuple[str, ...]  # Prompts with one {} each, for this network
    # Segments whose probability of being any class is lower are not shown, unless they are empty,
    # which costs nothing; 0 shows all
    min_score: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "side", least=1, most=1024)
        check_range(self, "batch", least=1, most=64)
        check_choice("style", self.style, STYLES)
        _check_std(self.std)
        check_range(self, "min_score", most=1.0)
        _check_templates(self.templates)


@dataclass(frozen=True, kw_only=True)
class RegionSpec:
    """Segments, and how two opinions about them become one."""

    num_regions: int  # Segments per image
    # "segments": only the segment's own class probabilities p count. "regions": only those of the
    # second network, p'. "all_classes": p^(1/3) p'^(2/3). "seen_and_unseen": that for unseen
    # classes, p^(2/3) m^(1/3) for seen ones, m being the mean of p' over seen classes
    fusion: str
    # The second network; None exactly if fusion is "segments"
    encoder: RegionEncoderSpec | None = None

    def __post_init__(self) -> None:
        check_range(self, "num_regions", least=1, most=256)
        check_choice("fusion", self.fusion, FUSIONS)
        if (self.encoder is None) != (self.fusion == "segments"):
            raise ValueError(f"encoder: expected one unless fusion is 'segments', {self.fusion!r}")


@dataclass(frozen=True, kw_only=True)
class ConceptSpec:
    """Concepts that a bundle's encoder was trained on; names far from them get a remark."""

    names: tuple[str, ...]  # What it was trained on
    also: tuple[str, ...] = ()  # Further phrases that are known to be among these
    # A phrase whose embedding's cosine with every one of names is below this is remarked upon;
    # None: embeddings tell nothing. Above it needs names that the bundle can embed
    least_cosine: float | None = None
    least_words: int = 1  # A phrase of fewer words is remarked upon unless it is among names
    # Phrases for all that it does not see; background="auto" takes them
    background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names: expected at least one, got none")
        for key in ("names", "also", "background"):
            _check_names(key, getattr(self, key))
        check_range(self, "least_cosine", least=-1.0, most=1.0)
        check_range(self, "least_words", least=1)


NARROW = ("int8", "fp8")
"""Precisions of 8 bits."""


@dataclass(frozen=True, kw_only=True)
class MaskLoss:
    """mIoU on pictures with masks, of the classes that the masks hold."""

    dataset: str  # Where pictures and masks are from
    # In percent: "mIoU", and of seen and unseen classes "mIoU(S)" and "mIoU(U)"; without those of
    # which the masks hold no class
    float32: dict[str, float]
    narrow: dict[str, float]  # The same of the graphs in 8 bits
    most: float  # Points that may be lost, and by which unseen classes may lose more than seen ones

    def __post_init__(self) -> None:
        if "mIoU" not in self.float32 or self.float32.keys() != self.narrow.keys():
            raise ValueError(f"narrow: expected mIoU and what float32 has, got {list(self.narrow)}")

    @property
    def lost(self) -> dict[str, float]:
        """Points lost, by the same names."""
        return {name: before - self.narrow[name] for name, before in self.float32.items()}

    @property
    def passed(self) -> bool:
        """Whether no more is lost than may be; NaN never is."""
        lost = self.lost
        more = lost.get("mIoU(U)", 0.0) - lost.get("mIoU(S)", 0.0)
        split = "mIoU(U)" in lost and "mIoU(S)" in lost
        return lost["mIoU"] <= self.most and (not split or more <= self.most)

    def describe(self) -> str:
        """One line for people."""
        figures = ", ".join(
            f"{name} {before:.2f} -> {self.narrow[name]:.2f}"
            for name, before in self.float32.items()
        )
        return f"on masks of {self.dataset}: {figures} (gate: {self.most:g} points lost)"


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """How a bundle's graphs in INT8 or FP8 were made, and what they lose on pictures."""

    agreement: float  # Share of cells with float32's label, among those where it is clear
    agreement_of_all: float  # The same among all cells
    min_agreement: float  # What was asked for
    # SHA-256 of the pictures, of a data set's their pixels': those that ranges are from, then those
    # measured on
    photos: tuple[str, ...]
    measured_photos: int  # How many of these, the last ones, were measured on
    classes: tuple[str, ...]  # The classes of the measurement
    # By graph, each layer that could be quantised and its precision
    layers: dict[str, dict[str, str]]
    seed: int = 0  # What chose images and samples
    masks: MaskLoss | None = None  # What is lost where masks say what is right; None without masks
    # By stage, how far the golden sample was off when the bundle was made
    golden: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_range(self, "min_agreement", least=1e-9, most=1.0)

    @property
    def passed(self) -> bool:
        """Whether agreement and mIoU are what was asked for; NaN never is."""
        return self.agreement >= self.min_agreement and (self.masks is None or self.masks.passed)


def _check_std(std: tuple[float, ...]) -> None:
    if min(std) <= 0:
        raise ValueError(f"std: expected values > 0, got {std}")


def _check_templates(templates: tuple[str, ...]) -> None:
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"templates: expected one '{{}}' in each, got {templates}")


def _check_names(key: str, names: tuple[str, ...]) -> None:
    for index, name in enumerate(names):
        check_plain_text(name, f"{key}[{index}]")
