"""Choose how the demo weighs cosines beside its masks, and put the choice into its bundle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.studies.make_demo import TEMPLATES, DemoConfig, provenance_of
from tools.studies.starts import COSINE_SCALE
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import HeadSpec
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BundleError
from zsseg_rt.export.bundle_writer import new_bundle_folder, write_golden, write_manifest
from zsseg_rt.models.clip.weights import image_config
from zsseg_rt.ops import reference
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.self_check import read_golden
from zsseg_rt.torch_files.clip_weights import load_clip
from zsseg_rt.training.calibration.calibrate import CalibrationSettings, choose_settings
from zsseg_rt.training.config import TrainConfig
from zsseg_rt.training.trained.calibration import Calibration

__all__ = ["choose_rule", "demo_run", "put_rule"]


def demo_run(clip: str | Path, config: DemoConfig) -> TrainConfig:
    """The demo's training as a run's configuration.

    Args:
        clip: ``clip.safetensors`` of the small CLIP's pretraining, or ``"demo"``, the shipped one.
        config: The recipe.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    side = config.size
    dim = image_config(load_clip(clip, activation="quick_gelu")).embed_dim
    augmentation = {
        "kind": "fit_inside",
        "crop_hw": [side, side],
        "scale": [side, side],
        "ratio_range": [1.0, 1.0],
        "max_class_share": 1.0,
        "distortion": {"probability": 0.0},
    }
    data = {"size": side, "length": config.num_scenes, "seed": config.seed}
    model = {
        "pretrained": str(clip),
        "activation": "quick_gelu",
        "image_size": side,
        "patch_stride": config.patch_stride,
        "num_prompts": config.num_prompts,
        "unit_inputs": True,
        "start": config.start,
        "start_offset": config.start_offset,
        "decoder": {"query_dim": dim, "ffn_dim": 4 * dim, "num_heads": config.decoder_heads},
    }
    if config.start == "aligned":
        model["start_scale"] = COSINE_SCALE  # as create_model, which knows no names
    task = {"learning_rate": config.learning_rate, "label_stride": config.label_stride}
    schedule = {"name": "poly", "min_factor": 0.005, "warmup_steps": config.warmup_steps}
    loop = {
        "iterations": config.iterations,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "checkpoint_interval": 250,
        "num_workers": 0,
        "device": "cpu",
    }
    return TrainConfig.from_dict(
        {
            "data": {
                "name": "scenes",
                "split": config.split,
                "options": data,
                "augmentation": augmentation,
            },
            "model": {"options": model},
            "text": {"templates": list(TEMPLATES)},
            "task": {"options": task},
            "schedule": schedule,
            "loop": loop,
        }
    )


def choose_rule(
    clip: str | Path,
    config: DemoConfig,
    work: Path,
    settings: CalibrationSettings | None = None,
) -> Calibration | None:
    """Choose settings by seen names held out of brief trainings; see :func:`choose_settings`.

    Returns:
        The choice; None if training was stopped. The same call continues it.

    Raises:
        ZssegError: See :func:`zsseg_rt.training.calibration.calibrate.calibrate`.
    """
    return choose_settings(demo_run(clip, config), work, settings, tell=print)


def put_rule(bundle: Path, chosen: Calibration) -> Path:
    """Write settings into a ZegCLIP bundle whose masks were not blended, without its model.

    Graphs and weights stay. The golden sample's masks, labels and scores are computed again from
    its own masks, patches and names by the NumPy definitions.

    Args:
        bundle: The bundle's folder; replaced in one step.
        chosen: The settings.

    Returns:
        ``bundle``.

    Raises:
        BundleError: It has cosines already, is not a ZegCLIP's, or does not pass its self-check
            with them.
    """
    old = Bundle.load(bundle)
    if old.architecture != "zegclip" or old.head.cosine is not None or chosen.cosine is None:
        raise BundleError(
            f"{bundle}: expected a ZegCLIP without cosines, and weights for them, got "
            f"{old.architecture}, {old.head.cosine} and {chosen.cosine}. Make it again."
        )
    head = replace(old.head, cosine=chosen.cosine, seen_bias=chosen.seen_bias)
    golden = read_golden(old, create_family(old, EngineConfig()))
    source = json.loads(old.provenance["source"]) | {"settings": provenance_of(chosen)}
    with new_bundle_folder(bundle, overwrite=True, verify=True) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
        new = replace(
            old,
            path=folder,
            head=head,
            golden=write_golden(folder, golden | _relabelled(golden, head)),
            provenance={**old.provenance, "source": json.dumps(source)},
        )
        write_manifest(folder, new)
    return bundle


def _relabelled(golden: dict[str, npt.NDArray[Any]], head: HeadSpec) -> dict[str, npt.NDArray[Any]]:
    """Masks blended with cosines, and the labels and scores that follow."""
    assert head.cosine is not None
    names = [str(name) for name in golden["class_names"]]
    seen, shape = np.isin(names, head.seen), golden["mask_logits"].shape
    cosines = reference.patch_text_similarity(
        golden["patch_embeds"], golden["text_embeds"], logit_scale=head.cosine.scale
    )
    logits = reference.blend_cosines(
        golden["mask_logits"],
        cosines.reshape(shape),
        head.cosine.weights(seen, len(names)),
        np.ones(len(names), np.float32),
        activation=head.activation,
    )
    height, width = golden["labels"].shape
    labels, scores = reference.upsample_argmax(
        logits,
        (height, width),
        activation=head.label_activation,
        seen=seen,
        seen_bias=head.seen_bias,
        with_scores=True,
    )
    assert scores is not None
    return {"mask_logits": logits, "labels": labels[0], "scores": scores[0]}
