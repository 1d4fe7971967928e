"""How well a small CLIP does on the synthetic world without any training on masks.

``python -m tools.studies.clip_checks runs/scenes_clip`` prints both checks of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.scenes import CLASS_NAMES, SEEN, SceneDataset, world_of_split
from tools.scenes.words import all_things
from tools.scenes.world import visible
from tools.studies.caption_batches import NEVER_CAPTIONED
from tools.studies.clip_pretraining import WEIGHTS, read_config
from tools.studies.crops import view_of
from tools.studies.small_clip import PretrainingConfig, SmallClip
from zsseg_rt.evaluation.evaluate import evaluate
from zsseg_rt.evaluation.metrics import SegmentationScores
from zsseg_rt.models import create_model, load_checkpoint
from zsseg_rt.models.dense.dense_clip import HEADS, Head
from zsseg_rt.training.class_embeddings import embed_phrases
from zsseg_rt.training.trained import TorchSegmenter

__all__ = ["ZeroShotScores", "classify_views", "load_run", "score_dense_heads"]

_log = logging.getLogger(__name__)

_CHUNK = 256
TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class ZeroShotScores:
    """Shares of views of single things that were named right.

    Attributes:
        things: Among all things of the world.
        never_captioned: The same for things whose words no caption had combined.
        classes: Among the segmentation classes that are things.
        unseen_classes: The same for the classes that segmenters do not see.
    """

    things: float
    never_captioned: float
    classes: float
    unseen_classes: float


@torch.no_grad()
def classify_views(
    model: SmallClip, *, num_scenes: int = 300, seed: int = 0, side: int = 64
) -> ZeroShotScores:
    """Name closer views of single things by the nearest text embedding.

    Args:
        model: The CLIP.
        num_scenes: How many scenes to take views from, for any things and for classes each.
        seed: Of the world.
        side: Side of views in pixels.
    """
    every = [kind.name for kind in all_things()]
    classes = [name for name in CLASS_NAMES if name in every]
    right = _right_names(model, every, _views(seed, 0.0, num_scenes, side))
    never = [hit for name, hit in right if name in NEVER_CAPTIONED]
    among_classes = _right_names(model, classes, _views(seed, 1.0, num_scenes, side))
    unseen = {name for index, name in enumerate(CLASS_NAMES) if index not in SEEN}
    return ZeroShotScores(
        things=_mean([hit for _, hit in right]),
        never_captioned=_mean(never),
        classes=_mean([hit for _, hit in among_classes]),
        unseen_classes=_mean([hit for name, hit in among_classes if name in unseen]),
    )


_OF_MANY_BLOCKS = ("sfp", "sc_clip")  # of eleven at least, which no small CLIP has


def load_run(folder: Path) -> SmallClip:
    """Load the CLIP of a finished :func:`tools.studies.clip_pretraining.pretrain`.

    Raises:
        CheckpointError: The folder does not hold one.
    """
    known = {field.name for field in dataclasses.fields(PretrainingConfig)}
    settings = read_config(folder)
    model = SmallClip(PretrainingConfig(**{k: v for k, v in settings.items() if k in known}))
    model.load_open_clip_state_dict(load_checkpoint(folder / WEIGHTS))
    return model.eval()


def score_dense_heads(
    clip: Path, text_embeds: Tensor, *, num_scenes: int = 200
) -> Iterator[tuple[Head, SegmentationScores]]:
    """Label scenes of the ``val`` split by each training-free head that changes one block alone.

    Args:
        clip: ``clip.safetensors``.
        text_embeds: Of the segmentation classes, ``[C, D]``.
        num_scenes: How many scenes.
    """
    for head in HEADS:
        if head in _OF_MANY_BLOCKS:
            continue
        model = create_model("dense_clip", pretrained=clip, activation="quick_gelu", head=head)
        segmenter = TorchSegmenter(model, CLASS_NAMES, text_embeds)
        yield head, evaluate(segmenter, SceneDataset("val", length=num_scenes)).scores


def _views(
    seed: int, class_share: float, num_scenes: int, side: int
) -> Iterator[tuple[NDArray[np.uint8], str]]:
    world = world_of_split("val", seed, class_share=class_share)
    for index in range(num_scenes):
        scene = world.scene(index, num_captions=0)
        for part in visible(scene.identities, scene.kinds, side * side // 5):
            if part.kind.is_thing:
                yield view_of(scene, part, side), part.kind.name


def _right_names(
    model: SmallClip,
    names: Sequence[str],
    views: Iterator[tuple[NDArray[np.uint8], str]],
) -> list[tuple[str, bool]]:
    text_embeds = embed_phrases(model.text, names, TEMPLATES)
    images, truths = zip(*views, strict=True)
    stacked = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
    embeds = [model.encode_images(chunk)[0] for chunk in torch.split(stacked, _CHUNK)]
    found = (torch.cat(embeds) @ text_embeds.T).argmax(dim=1).tolist()
    return [(truth, names[index] == truth) for truth, index in zip(truths, found, strict=True)]


def _mean(hits: Sequence[bool]) -> float:
    return float(np.mean(hits)) if hits else float("nan")


def main() -> None:
    """Read the command line and print the checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--num-scenes", type=int, default=200)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load_run(arguments.run)
    scores = classify_views(model, num_scenes=arguments.num_scenes)
    for name, share in dataclasses.asdict(scores).items():
        _log.info("views named right, %s: %.1f %%", name.replace("_", " "), 100 * share)
    text_embeds = embed_phrases(model.text, CLASS_NAMES, TEMPLATES)
    for head, dense in score_dense_heads(
        arguments.run / WEIGHTS, text_embeds, num_scenes=arguments.num_scenes
    ):
        seen, unseen = 100 * dense.miou_seen, 100 * dense.miou_unseen
        _log.info("%s: mIoU of seen classes %.1f %%, of unseen ones %.1f %%", head, seen, unseen)


if __name__ == "__main__":
    main()
