"""Make the bundle that ships with the package: a small ZegCLIP of the synthetic world.

It sees masks of the seen classes only. ``tools/make_demo.py`` is the command.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import torch
from torch import Tensor, nn

from tools.scenes import (
    CLASS_NAMES,
    SEEN,
    WORLD_VERSION,
    SceneDataset,
    words_of_world,
    world_of_split,
)
from tools.scenes.captions import FUNCTION_WORDS
from tools.studies.starts import HeadStart
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import ConceptSpec
from zsseg_rt.demo import DEMOS
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.evaluation.evaluate import Evaluation, evaluate
from zsseg_rt.export.bundle_writer import write_manifest
from zsseg_rt.export.exporters import export_bundle
from zsseg_rt.export.words import written_text
from zsseg_rt.models import create_model
from zsseg_rt.models.descriptor.model import DecoderConfig, ZegCLIP
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.torch_files.clip_arrays import SHIPPED_FILE, is_shipped
from zsseg_rt.training.assembly import batch_source
from zsseg_rt.training.class_embeddings import embed_phrases
from zsseg_rt.training.config import LoopConfig, ScheduleConfig
from zsseg_rt.training.data import FitInsideAugmentation, TrainingSamples
from zsseg_rt.training.loop.loop import run_loop
from zsseg_rt.training.tasks.descriptor import DescriptorTask
from zsseg_rt.training.trained import TorchSegmenter

__all__ = ["TEMPLATES", "DemoConfig", "evaluate_demo", "small_zegclip"]
__all__ += ["train_demo", "write_demo"]

DEMO = DEMOS["scenes"]
TEMPLATES = ("a photo of a {}.",)
_PHOTO_INDICES = (3, 121, 34, 9608)  # scenes that the shipped bundle labels well
_SPACE = "small CLIP of the synthetic world"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How the segmenter of the demo is trained.

    Attributes:
        iterations: Optimizer steps.
        batch_size: Scenes per step.
        learning_rate: Peak rate; ZegCLIP's own is for a CLIP 12 times as large.
        warmup_steps: Steps of linear warm-up.
        num_prompts: Visual prompts per layer.
        decoder_heads: Heads of the mask decoder.
        num_scenes: Scenes per epoch.
        size: Side of scenes and of the segmenter's input, in pixels.
        patch_stride: Pixels from one patch to the next; half the patch size doubles the grid.
        label_stride: The loss uses one row and column of labels in this many, which costs less;
            masks are learned on a grid that is coarser still.
        seed: Seed of the scenes, the initial weights and every other choice.
        split: Training scenes; ``"train_seen"`` shows the unseen names as rarely as any others.
        start: The decoder's initial weights.
        start_offset: Added to all mask logits of the aligned start.
        seen_bias: What the probabilities of seen classes are lowered by.
    """

    iterations: int = 4000
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    num_prompts: int = 10
    decoder_heads: int = 4
    num_scenes: int = 20_000
    size: int = 128
    patch_stride: int = 8
    label_stride: int = 4
    seed: int = 0
    split: Literal["train", "train_seen"] = "train_seen"
    start: Literal["random", "aligned"] = "aligned"
    start_offset: float = -3.6
    seen_bias: float = 0.05

    def __post_init__(self) -> None:
        if self.size % 16:
            raise ArgumentError(
                f"size: expected a multiple of the patch size 16, got {self.size}. Choose another."
            )


def small_zegclip(clip: str | Path, config: DemoConfig) -> ZegCLIP:
    """A ZegCLIP on a small CLIP, before training.

    Args:
        clip: ``clip.safetensors`` of :mod:`tools.studies.clip_pretraining`, or ``"demo"``,
            the shipped one.
        config: Sizes.

    Raises:
        CheckpointError: The file is not a CLIP's.
    """
    embed_dim = _metadata(clip)["config"]["embed_dim"]
    torch.manual_seed(config.seed)
    model = create_model(
        "zegclip",
        pretrained=clip,
        activation="quick_gelu",
        image_size=config.size,
        patch_stride=config.patch_stride,
        num_prompts=config.num_prompts,
        seen_classes=SEEN,
        decoder=DecoderConfig(
            query_dim=embed_dim, ffn_dim=4 * embed_dim, num_heads=config.decoder_heads
        ),
        unit_inputs=True,
    )
    zegclip = cast(ZegCLIP, model)
    start = HeadStart(aligned=config.start == "aligned", offset=config.start_offset)
    start.apply(zegclip.decode_head)
    zegclip.config = dataclasses.replace(zegclip.config, seen_bias=config.seen_bias)
    return zegclip


def embed_classes(model: ZegCLIP) -> Tensor:
    """Embeddings of the world's classes by a model's own text tower, ``[C, D]``, unit norm."""
    if model.text_encoder is None:
        raise CheckpointError("model: expected a text tower, got none. Build it with one.")
    return embed_phrases(model.text_encoder, CLASS_NAMES, TEMPLATES)


def train_demo(
    clip: str | Path, config: DemoConfig, run_folder: Path, *, resume: bool = False
) -> ZegCLIP:
    """Train the segmenter on masks of the seen classes.

    Args:
        clip: Weights of the small CLIP, as for :func:`small_zegclip`.
        config: The recipe.
        run_folder: Where checkpoints and the history are written.
        resume: Whether to continue from the last checkpoint.

    Returns:
        The model, in evaluation mode.
    """
    model = small_zegclip(clip, config)
    task = DescriptorTask(
        model,
        embed_classes(model),
        seen=SEEN,
        learning_rate=config.learning_rate,
        label_stride=config.label_stride,
    )
    loop = LoopConfig(
        iterations=config.iterations,
        batch_size=config.batch_size,
        seed=config.seed,
        checkpoint_interval=250,
        num_workers=1,
    )
    rates = ScheduleConfig(min_factor=0.005, warmup_steps=config.warmup_steps)
    run_loop(
        task,
        batch_source(_scenes(config), loop),
        config=loop,
        run_folder=run_folder,
        schedule=lambda step: rates.factor(step, config.iterations),
        resume=resume,
    )
    return model.cpu().eval()


def _scenes(config: DemoConfig) -> TrainingSamples:
    """Training scenes as they are drawn, mirrored at random."""
    side = config.size
    dataset = SceneDataset(config.split, size=side, length=config.num_scenes, seed=config.seed)
    augmentation = FitInsideAugmentation(
        crop_hw=(side, side),
        scale=(side, side),
        ratio_range=(1.0, 1.0),
        max_class_share=1.0,
        distortion=None,
    )
    return TrainingSamples(dataset, augmentation, config.seed)


def evaluate_demo(
    model: nn.Module, *, size: int = 128, zoom: int = 1, length: int = 300
) -> Evaluation:
    """Seen and unseen figures on scenes of the ``val`` split."""
    zegclip = cast(ZegCLIP, model)
    names = tuple(CLASS_NAMES[index] for index in SEEN)
    segmenter = TorchSegmenter(zegclip, CLASS_NAMES, embed_classes(zegclip), seen_names=names)
    return evaluate(segmenter, SceneDataset("val", size=size, zoom=zoom, length=length))


def write_demo(
    model: ZegCLIP,
    clip: str | Path,
    config: DemoConfig,
    folder: Path,
    *,
    commit: str = "",
) -> Path:
    """Write bundle, images and class names where the package looks for them.

    Args:
        model: The trained segmenter.
        clip: The CLIP it was trained on; its metadata describe its run.
        config: The recipe.
        folder: ``zsseg_rt/demo`` of the project.
        commit: The project's commit, for the provenance.

    Returns:
        The bundle.
    """
    source = {
        "recipe": "tools/make_demo.py",
        "commit": commit,
        "world_version": WORLD_VERSION,
        "clip": _metadata(clip),
        "zegclip": dataclasses.asdict(config),
    }
    bundle = export_bundle(
        model,
        folder / DEMO.bundle,
        class_names=CLASS_NAMES,
        text_encoder=_rounded_text_encoder(model),
        templates=TEMPLATES,
        precisions=("float32",),
        space=_SPACE,
        source=json.dumps(source),
        licence="Apache-2.0",
        overwrite=True,
    )
    concepts = ConceptSpec(names=CLASS_NAMES, least_words=2)
    write_manifest(bundle, dataclasses.replace(Bundle.load(bundle), concepts=concepts))
    (folder / DEMO.classes).write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    _write_photos(folder, config.size)
    return bundle


def _rounded_text_encoder(model: ZegCLIP) -> WrittenText:
    """The text tower of the world's words, rounded to float16: half the bytes."""
    if model.text_encoder is None:
        raise CheckpointError("model: expected a text tower, got none. Build it with one.")
    encoder = written_text(copy.deepcopy(model.text_encoder).half().float())
    assert encoder is not None
    return dataclasses.replace(
        encoder, words=tuple(words_of_world()), prompt_words=tuple(FUNCTION_WORDS)
    )


def _write_photos(folder: Path, size: int) -> None:
    world = world_of_split("demo", size=size, zoom=2)
    for name, index in zip(DEMO.photos, _PHOTO_INDICES, strict=True):
        cv2.imwrite(str(folder / name), world.scene(index).image[..., ::-1])


def _metadata(clip: str | Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(SHIPPED_FILE if is_shipped(clip) else clip, framework="np") as file:
        text = (file.metadata() or {}).get("provenance")
    if text is None:
        raise CheckpointError(
            f"{clip}: expected weights of tools.studies.clip_pretraining, got a file "
            "without its metadata. Train a small CLIP first."
        )
    return cast("dict[str, Any]", json.loads(text))
