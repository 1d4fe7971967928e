"""Export plain CLIP with a dense head from its weights file, without torch and onnx."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.checks import check_choice, check_size
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.golden import (
    GOLDEN_NAMES,
    GOLDEN_TEMPLATES,
    dense_golden,
    preprocess_frame,
)
from zsseg_rt.export.graph_files import MAX_CLASSES, image_network, provenance
from zsseg_rt.export.options import COMMON_OPTIONS, ExportOptions, read_options
from zsseg_rt.export.text_side import TextSide, clip_text_side
from zsseg_rt.networks.aggregating import (
    RULES_OF_OUTLIERS,
    SHIPPED_LAYERS,
    AggregationConfig,
    OutlierRule,
    check_grid,
)
from zsseg_rt.networks.clip import ImageTower, TextTower
from zsseg_rt.networks.heads import HEADS, dense_embeds
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.torch_files.clip_arrays import (
    CLIP_MEAN,
    CLIP_STD,
    ClipTensors,
    check_heads,
    read_clip,
)
from zsseg_rt.torch_files.clip_space import describe_space

ACTIVATIONS = ("quick_gelu", "gelu")
_SCALES = {"maskclip": 100.0, "vanilla": 100.0, "clearclip": 50.0}  # the authors'; others: 40
_READS = COMMON_OPTIONS | {"class_names", "window_batch"}

OnProgress = Callable[[int, int], None]
OnMark = Callable[[str], None] | None


@dataclass(frozen=True, kw_only=True)
class DenseHead:
    """What is made of the weights.

    Attributes:
        head: One of :data:`zsseg_rt.networks.heads.HEADS`.
        size_hw: Input size in pixels, multiples of the patch size.
        activation: The MLPs', ``"quick_gelu"`` or ``"gelu"``; None takes the likely one.
        num_heads: Heads of the image tower; None is one per 64 channels.
        text_heads: Heads of the text tower; None is one per 64 channels.
        logit_scale: Multiplies the cosine similarity; None is the authors'.
        unknown_below: Probability below which a pixel is unknown.
        position: How positions are resized, by ``"size"`` or ``"as_published"``.
        pm: For SFP and SC-CLIP, like the two that follow: how outliers are found; see
            :class:`zsseg_rt.networks.aggregating.AggregationConfig`.
        r: See there.
        beta: See there.
    """

    head: str = "naclip"
    size_hw: tuple[int, int] = (448, 448)
    activation: str | None = None
    num_heads: int | None = None
    text_heads: int | None = None
    logit_scale: float | None = None
    unknown_below: float | None = None
    position: str = "size"
    pm: OutlierRule | None = None
    r: float = 0.3
    beta: float = 0.4

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)
        if self.activation is not None:
            check_choice("activation", self.activation, ACTIVATIONS)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ArgumentError(
                f"logit_scale: expected a number above 0, got {self.scale}. Change it."
            )
        if self.unknown_below is not None and not 0 <= self.unknown_below <= 1:
            raise ArgumentError(
                f"unknown_below: expected a probability in [0, 1], got {self.unknown_below}. "
                "Use None to keep every pixel."
            )
        check_choice("position", self.position, ("size", "as_published"))
        self.aggregation({})

    def aggregation(self, layers: Mapping[str, int]) -> AggregationConfig:
        """Settings of SFP and SC-CLIP, with these layers instead of the official ones."""
        return AggregationConfig(pm=self.pm, r=self.r, beta=self.beta, **layers)

    @property
    def scale(self) -> float:
        """The factor on cosines."""
        return _SCALES.get(self.head, 40.0) if self.logit_scale is None else self.logit_scale


def export_clip_file(
    file: str | Path,
    path: str | Path,
    settings: DenseHead,
    *,
    check: Callable[[ClipTensors], None] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Path:
    """Write a bundle of a CLIP's weights; memory stays below three times theirs.

    Its golden sample is what NumPy computes of the network on one picture; the graphs, then the
    whole engine, are compared with it before the bundle appears under its name.

    Args:
        file: A .safetensors file with open_clip's names, or ``"demo"``: the CLIP that ships.
        path: Folder to write, ``NAME.zsseg``.
        settings: The head, and what a weights file does not say.
        check: May refuse the weights.
        on_progress: Hears how many of how many parts of the network NumPy has computed.
        **options: The common ones of :class:`zsseg_rt.export.options.ExportOptions`,
            ``class_names`` and ``window_batch``.

    Returns:
        The bundle folder.

    Raises:
        ArgumentError: An option does not exist, or not for CLIP.
        BundleError: The folder exists, cannot be written, or the bundle disagrees with NumPy.
        CheckpointError: The weights are damaged, another model's, or without a text tower.
        ShapeError: Patches do not fill the size.
        VocabularyError: Names, templates or the text bank are unusable.
    """
    found = {"space": describe_space(file), "source": Path(file).name}
    chosen = read_options(found | options, _READS, "CLIP")
    weights = read_clip(file)
    if check is not None:
        check(weights)
    exported = _cut(weights, settings, chosen, on_progress)
    return write_model_bundle(Path(path), exported, chosen)


def _cut(
    weights: ClipTensors,
    settings: DenseHead,
    options: ExportOptions,
    on_progress: OnProgress | None,
) -> ExportedModel:
    activation = settings.activation or weights.likely_activation()
    image, text = _towers(weights, settings, activation)
    check_size(settings.size_hw, image.patch_size)
    aggregation = settings.aggregation(SHIPPED_LAYERS if weights.words else {})
    _check_room(settings, aggregation, image)
    mark = part_counter(text.tensors, len(image.blocks), on_progress)
    tower = WrittenText(
        tower=text, words=weights.words, prompt_words=weights.prompt_words, on_mark=mark
    )
    side = clip_text_side(options, embed_dim=weights.embed_dim, tower=tower)
    head = HeadSpec(
        logit_scale=settings.scale,
        normalize=True,
        activation="softmax",
        grid_hw=image.grid_hw(settings.size_hw),
        unknown_below=settings.unknown_below,
        max_classes=MAX_CLASSES,
        window_batch=options.window_batch,
    )
    preprocess = PreprocessSpec(size_hw=settings.size_hw, mean=CLIP_MEAN, std=CLIP_STD)
    encode = partial(
        dense_embeds,
        tower=image,
        head=settings.head,
        position=settings.position,
        aggregation=aggregation,
    )
    names = (options.class_names or GOLDEN_NAMES)[:MAX_CLASSES]

    name = f"dense_clip {settings.head}"
    made = written_model(encode, head, preprocess, side, names, mark, architecture=name)
    return replace(made, provenance={**made.provenance, "activation": activation})


def written_model(
    encode: Callable[..., Any],
    head: HeadSpec,
    preprocess: PreprocessSpec,
    side: TextSide,
    names: Sequence[str],
    mark: OnMark = None,
    *,
    architecture: str,
) -> ExportedModel:
    """A dense bundle's parts from ``encode(ops, image=)``, which NumPy computes once.

    ``names`` serve the golden sample.
    """

    def golden() -> dict[str, npt.NDArray[Any]]:
        embeds, extra = side.embed_golden(names, side.templates[:GOLDEN_TEMPLATES])
        frame = preprocess_frame(preprocess)
        return dense_golden(frame, encode(Arrays(mark), image=frame), head, (names, embeds)) | extra

    return ExportedModel(
        family="dense",
        architecture=architecture,
        graphs={"image_encoder": image_network(encode, preprocess.size_hw, head.window_batch)},
        preprocess=preprocess,
        head=head,
        text=side,
        golden=golden,
        provenance=provenance(),
    )


def _check_room(settings: DenseHead, aggregation: AggregationConfig, image: ImageTower) -> None:
    """Refuse too few blocks or cells for a head that repairs outliers."""
    if settings.head in RULES_OF_OUTLIERS:
        aggregation.check_depth(len(image.blocks))
        rule = aggregation.pm or RULES_OF_OUTLIERS[settings.head]
        check_grid(rule, image.grid_hw(settings.size_hw))


def _towers(
    weights: ClipTensors, settings: DenseHead, activation: str
) -> tuple[ImageTower, TextTower]:
    def heads(name: str, given: int | None, tensors: Mapping[str, npt.NDArray[Any]]) -> int:
        return check_heads(name, given, int(tensors["positional_embedding"].shape[1]))

    image = ImageTower(
        tensors=weights.visual,
        num_heads=heads("num_heads", settings.num_heads, weights.visual),
        activation=activation,
    )
    text = TextTower(
        tensors=weights.text,
        num_heads=heads("text_heads", settings.text_heads, weights.text),
        activation=activation,
    )
    return image, text


def part_counter(
    text: Mapping[str, npt.NDArray[Any]], num_blocks: int, on_progress: OnProgress | None
) -> OnMark:
    """Counts the parts that NumPy has computed of a text tower and an image tower."""
    if on_progress is None:
        return None
    hear, done = on_progress, 0
    depth = len({key.split(".")[2] for key in text if key.startswith("transformer.")})
    total = depth + num_blocks + 2

    def mark(_: str) -> None:
        nonlocal done
        done = min(done + 1, total)
        hear(done, total)

    return mark
