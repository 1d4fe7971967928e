"""All options of an export: every option of every exporter, documented once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.files import read_limited
from zsseg_rt.common.schema import check_plain_text, decode, nearest
from zsseg_rt.common.settings import Option, documented, setting
from zsseg_rt.errors import ArgumentError, BundleError, CheckpointError
from zsseg_rt.export.graph_files import DEFAULT_PRECISIONS, GRAPH_PRECISIONS

if TYPE_CHECKING:
    from torch import nn

_MAX_TOKENIZER_BYTES = 64 << 20
TextBank = tuple[Sequence[str], npt.NDArray[np.floating[Any]]]


@documented
@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export; an exporter refuses those that it does not read."""

    precisions: Sequence[str] = setting(
        DEFAULT_PRECISIONS,
        'Graph variants, of ``"float32"``, ``"float16"`` and ``"bfloat16"``.',
        Option(
            "float32, float16, bfloat16; may repeat; default: the first two.",
            ("--precision",),
            kind=list[str] | None,
        ),
    )
    templates: Sequence[str] | None = setting(
        None, "Prompts with one ``{}`` each; None takes the model's, or the architecture's."
    )
    template_set: str | None = setting(None, "A short name for the templates; None chooses one.")
    text_bank: TextBank | None = setting(
        None,
        "Names with embeddings float [C, D] that ``set_classes`` uses for these names; for "
        "ZegFormer also [2, C, D], for segments and regions.",
    )
    space: str | None = setting(
        None,
        "Human-readable name of the joint space of the embeddings; None takes the one that the "
        "architecture's official weights live in.",
    )
    source: str = setting("", "Human-readable note on where the weights come from.")
    licence: str = setting("", "Licence of the weights.", "Licence of the weights.")
    overwrite: bool = setting(
        False, "Whether to replace an existing bundle.", "Replace an existing bundle."
    )
    verify: bool = setting(
        True, "Whether to compare the bundle with the model it was made from; leave it on."
    )
    class_names: Sequence[str] | None = setting(
        None,
        "The classes that the model's ``seen_classes`` index; they name the seen classes in the "
        "bundle and serve the golden sample. At run time the bundle takes any classes.",
        of="models",
    )
    text_encoder: nn.Module | Literal["auto"] | None = setting(
        "auto",
        "``\"auto\"`` takes the model's text tower if it has one with CLIP's vocabulary (one that "
        "was trained on few words is cut down to them); a module is used instead; None writes none "
        "(classes then need embeddings or a bank).",
        of="models",
    )
    size_hw: tuple[int, int] | None = setting(
        None,
        "Input size in pixels; None is the model's own (ZegFormer: 512x512). Patches must fill it; "
        "for ZegFormer sides are multiples of 32.",
        of="models",
    )
    tokenizer: str | Path | bytes | None = setting(
        None,
        "For TIPS: its SentencePiece model, a file or the file's content; needed with a text "
        "tower.",
        of="some",
    )
    region_templates: Sequence[str] | None = setting(
        None,
        "For ZegFormer: prompts around the names that regions are compared with; None takes "
        "CLIP's.",
        of="some",
    )
    grid_hw: tuple[int, int] | None = setting(
        None,
        "For foreign encoders, like all that follow: the patch grid; None reads it from a "
        "[1, D, gh, gw] output, and takes square patches for [1, N, D].",
        "Rows and columns of patches, for outputs [1, N, D]; default: those of square patches.",
        of="encoders",
    )
    embed_output: str | None = setting(
        None,
        "The output with the embeddings; None takes the first.",
        "Name of the graph's output; default: the first.",
        of="encoders",
    )
    logit_scale: float = setting(
        100.0,
        "Multiplies the similarity.",
        "Factor of the cosine similarity.",
        of="encoders",
    )
    normalize: bool = setting(
        True, "True for cosine similarity, False for a dot product.", of="encoders"
    )
    activation: str = setting(
        "softmax",
        '``"none"``, ``"sigmoid"`` or ``"softmax"``.',
        "none, sigmoid or softmax.",
        of="encoders",
    )
    unknown_below: float | None = setting(
        None, "Score below which a pixel is unknown; None keeps every pixel.", of="encoders"
    )
    architecture: str = setting("onnx", "Human-readable name of the encoder.", of="encoders")
    align: str | None = setting(
        None,
        'Where cells lie, ``"half_pixel"`` or ``"corners"``, see '
        ":class:`zsseg_rt.bundles.specs.HeadSpec`; None guesses: ``corners`` if the sides, less "
        "one pixel, are a whole number of steps from the first cell to the last, such as 33 cells "
        "in 16 * 32 + 1 pixels, and not of cells.",
        "Where cells lie: half_pixel (centres) or corners; default: guessed from the sizes.",
        of="encoders",
    )

    def __post_init__(self) -> None:
        precisions = self.precisions
        is_list = isinstance(precisions, Sequence) and not isinstance(precisions, str)
        if not is_list or not precisions or any(p not in GRAPH_PRECISIONS for p in precisions):
            raise BundleError(
                f"precisions: expected some of {', '.join(GRAPH_PRECISIONS)}, got {precisions!r}. "
                "The command quantize adds int8 and fp8."
            )

    def read_tokenizer(self) -> bytes:
        """The content of :attr:`tokenizer`."""
        if isinstance(self.tokenizer, bytes):
            return self.tokenizer
        try:
            return read_limited(Path(str(self.tokenizer)), max_bytes=_MAX_TOKENIZER_BYTES)
        except OSError as exc:
            raise CheckpointError(
                f"tokenizer: expected the model's own tokenizer, got a file that cannot be read: "
                f"{exc}. Check the path, or put it beside the weights."
            ) from exc


_KINDS: dict[Any, Any] = {
    "str": str,
    "str | None": str | None,
    "bool": bool,
    "int": int,
    "float": float,
    "float | None": float | None,
}
"""Of options that are one plain value, by their annotation; what they may be."""
_PLAIN = (str, bytes, bool, int, float, list, tuple, dict, type(None))


def _read_by(*readers: str) -> frozenset[str]:
    return frozenset(one.name for one in fields(ExportOptions) if one.metadata["of"] in readers)


COMMON_OPTIONS = _read_by("all")
"""Options that every exporter reads."""

MODEL_OPTIONS = _read_by("all", "models")
"""Options that the exporter of every torch model reads."""

ENCODER_OPTIONS = _read_by("all", "encoders")
"""Options that the exporter of foreign encoders reads."""


def read_options(raw: Mapping[str, Any], reads: Collection[str], exported: str) -> ExportOptions:
    """Take options by name."""
    kinds: dict[str, Any] = {one.name: _KINDS.get(one.type) for one in fields(ExportOptions)}
    for name in raw:
        if name not in kinds:
            hint = nearest(name, [option for option in kinds if option in reads])
            raise ArgumentError(f"{name}: expected an option of export, got an unknown one. {hint}")
        if name not in reads:
            raise ArgumentError(
                f"{name}: expected nothing for {exported}, whose exporter does not read it, got a "
                "value. Leave it out."
            )
        if kinds[name] is not None and isinstance(raw[name], _PLAIN):
            value = decode(kinds[name], raw[name], name, ArgumentError)
            for line in value.splitlines() if isinstance(value, str) else ():
                check_plain_text(line, name)
    return ExportOptions(**raw)
