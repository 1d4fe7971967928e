"""All options of an export: every option of every exporter, documented once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import WINDOW_BATCHES
from zsseg_rt.common.schema import check_plain_text, decode, nearest
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.graph_files import DEFAULT_PRECISIONS, check_precisions

if TYPE_CHECKING:
    from torch import nn

    from zsseg_rt.export.word_subset import WordSubset

TextBank = tuple[Sequence[str], npt.NDArray[np.floating[Any]]]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export; an exporter refuses those that it does not read.

    Every exporter reads ``precisions``, ``templates``, ``template_set``, ``text_bank``, ``name``,
    ``space``, ``source``, ``licence``, ``overwrite`` and ``verify``.

    Attributes:
        precisions: Graph variants, of ``"float32"`` and ``"float16"``.
        templates: Prompts with one ``{}`` each; None takes the model's, or the architecture's.
        template_set: A short name for the templates; None chooses one.
        text_bank: Names with embeddings float [C, D] that ``set_classes`` uses for these names;
            for ZegFormer also [2, C, D], for segments and regions.
        name: Name in the manifest; None takes the folder's.
        space: Human-readable name of the joint space of the embeddings; None takes the one that
            the architecture's official weights live in.
        source: Human-readable note on where the weights come from.
        licence: Licence of the weights.
        overwrite: Whether to replace an existing bundle.
        verify: Whether to compare the bundle with the model it was made from; leave it on.
        class_names: The classes that the model's ``seen_classes`` index; they name the seen classes
            in the bundle and serve the golden sample. At run time the bundle takes any classes.
        text_encoder: ``"auto"`` takes the model's text tower if it has one with CLIP's vocabulary
            (one that was trained on few words is cut down to them); a module is used instead; None
            writes none (classes then need embeddings or a bank).
        size_hw: Input size in pixels; None is the model's own (ZegFormer: 512x512). Patches must
            fill it; for ZegFormer sides are multiples of 32.
        word_subset: For ZegCLIP and CLIP-RC: a text tower that knows only some words, written
            instead of ``text_encoder``; see :func:`zsseg_rt.export.word_subset.keep_words`.
        tokenizer: For TIPS: its SentencePiece model, a file or the file's content; needed with a
            text tower.
        region_templates: For ZegFormer: prompts around the names that regions are compared with;
            None takes CLIP's.
        grid_hw: For foreign encoders, like all that follow: the patch grid; None reads it
            from a [1, D, gh, gw] output, and takes square patches for [1, N, D].
        embed_output: The output with the embeddings; None takes the first.
        logit_scale: Multiplies the similarity.
        normalize: True for cosine similarity, False for a dot product.
        activation: ``"none"``, ``"sigmoid"`` or ``"softmax"``.
        unknown_below: Score below which a pixel is unknown; None keeps every pixel.
        architecture: Human-readable name of the encoder.
        align: Where cells lie, ``"half_pixel"`` or ``"corners"``, see
            :class:`zsseg_rt.bundles.specs.HeadSpec`; None guesses: ``corners`` if the sides, less
            one pixel, are a whole number of steps from the first cell to the last, such as 33 cells
            in 16 * 32 + 1 pixels, and not of cells.
        window_batch: For dense CLIP, the cosine head, TIPS and ZegCLIP: how many windows of one
            frame the graphs take in one run, 1, 2 or 4.
    """

    precisions: Sequence[str] = DEFAULT_PRECISIONS
    templates: Sequence[str] | None = None
    template_set: str | None = None
    text_bank: TextBank | None = None
    name: str | None = None
    space: str | None = None
    source: str = ""
    licence: str = ""
    overwrite: bool = False
    verify: bool = True
    class_names: Sequence[str] | None = None
    text_encoder: nn.Module | Literal["auto"] | None = "auto"
    size_hw: tuple[int, int] | None = None
    word_subset: WordSubset | None = None
    tokenizer: str | Path | bytes | None = None
    region_templates: Sequence[str] | None = None
    grid_hw: tuple[int, int] | None = None
    embed_output: str | None = None
    logit_scale: float = 100.0
    normalize: bool = True
    activation: str = "softmax"
    unknown_below: float | None = None
    architecture: str = "onnx"
    align: str | None = None
    window_batch: int = 1

    def __post_init__(self) -> None:
        check_precisions(self.precisions)
        if self.window_batch not in WINDOW_BATCHES:
            raise ArgumentError(
                f"window_batch: expected one of {', '.join(map(str, WINDOW_BATCHES))}, got "
                f"{self.window_batch}. It is how many windows the graphs take in one run."
            )


_KINDS: dict[str, Any] = {
    "template_set": str | None, "name": str | None, "space": str | None, "source": str,
    "licence": str, "overwrite": bool, "verify": bool, "embed_output": str | None,
    "logit_scale": float, "normalize": bool, "activation": str, "unknown_below": float | None,
    "architecture": str, "align": str | None, "window_batch": int,
}  # fmt: skip
"""Of options that are one plain value; what they may be."""
_PLAIN = (str, bytes, bool, int, float, list, tuple, dict, type(None))

COMMON_OPTIONS = frozenset(
    {
        "precisions", "templates", "template_set", "text_bank", "name",
        "space", "source", "licence", "overwrite", "verify",
    }
)  # fmt: skip
"""Options that every exporter reads."""

MODEL_OPTIONS = COMMON_OPTIONS | {"class_names", "text_encoder", "size_hw"}
"""Options that the exporter of every torch model reads."""

ENCODER_OPTIONS = COMMON_OPTIONS | {
    "grid_hw", "embed_output", "logit_scale", "normalize", "activation", "unknown_below",
    "architecture", "align",
}  # fmt: skip
"""Options that the exporter of foreign encoders reads."""


def read_options(given: Mapping[str, Any], reads: Collection[str], exported: str) -> ExportOptions:
    """Take options by name."""
    known = [field.name for field in fields(ExportOptions)]
    for name in given:
        if name not in known:
            hint = nearest(name, [option for option in known if option in reads])
            raise ArgumentError(f"{name}: expected an option of export, got an unknown one. {hint}")
        if name not in reads:
            raise ArgumentError(
                f"{name}: expected nothing for {exported}, whose exporter does not read it, got a "
                "value. Leave it out."
            )
        if name in _KINDS and isinstance(given[name], _PLAIN):
            value = decode(_KINDS[name], given[name], name, ArgumentError)
            for line in value.splitlines() if isinstance(value, str) else ():
                check_plain_text(line, name)
    return ExportOptions(**given)
