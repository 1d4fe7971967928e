"""Train a small CLIP on the captions of the synthetic world.

``python -m tools.studies.clip_pretraining --out FOLDER`` writes ``clip.safetensors`` in
open_clip's layout, which :func:`zsseg_rt.models.load_clip` reads with
``activation="quick_gelu"``. An interrupted run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from tools.scenes import WORLD_VERSION
from tools.studies.caption_batches import CaptionBatch, CaptionBatches
from tools.studies.small_clip import PretrainingConfig, SmallClip
from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import ArgumentError, CheckpointError, TrainingError, ZssegError
from zsseg_rt.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from zsseg_rt.training.data import one_opencv_thread, prepare_worker
from zsseg_rt.training.loop.checkpointing import writing
from zsseg_rt.training.loop.loop import BatchSource, run_loop
from zsseg_rt.training.tasks.labelled import TrainingTask, parameter_groups

__all__ = ["ClipTask", "contrastive_loss", "pretrain", "read_config"]

_log = logging.getLogger(__name__)

WEIGHTS, CONFIG = "clip.safetensors", "config.json"
_MAX_LOGIT_SCALE = math.log(100.0)


def contrastive_loss(
    image_embeds: Tensor, text_embeds: Tensor, caption_of: Tensor, logit_scale: Tensor
) -> Tensor:
    """Match each image with its caption among all, and each caption with its image.

    The mean of two cross-entropies over ``logit_scale * image . text``. Other images with the
    same caption are neither right nor wrong, so they are left out.

    Args:
        image_embeds: ``[B, D]``, unit norm.
        text_embeds: Embeddings of the U distinct captions, ``[U, D]``, unit norm.
        caption_of: Index of each image's caption, int64 ``[B]``.
        logit_scale: Inverse temperature.

    Returns:
        A scalar.

    Source:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        ICML 2021.
    """
    logits = logit_scale * image_embeds @ text_embeds[caption_of].T
    twins = caption_of[:, None] == caption_of[None, :]
    twins.fill_diagonal_(False)
    logits = logits.masked_fill(twins, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ClipTask(TrainingTask):
    """The contrastive objective, for :func:`zsseg_rt.training.loop.loop.run_loop`.

    Args:
        model: The CLIP.
        config: The run's configuration.
    """

    model: SmallClip

    def __init__(self, model: SmallClip, config: PretrainingConfig) -> None:
        super().__init__(model)
        self.config = config

    def forward(self, batch: CaptionBatch) -> dict[str, Tensor]:  # type: ignore[override]
        """The weighted terms: ``contrastive`` and, if it has a weight, ``patches``."""
        cls_embeds, mean_embeds = self.model.encode_images(batch.images)
        text_embeds = self.model.encode_texts(batch.tokens)
        scale = self.model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        terms = {"contrastive": contrastive_loss(cls_embeds, text_embeds, batch.caption_of, scale)}
        if self.config.patch_weight:
            patches = contrastive_loss(mean_embeds, text_embeds, batch.caption_of, scale)
            terms["patches"] = self.config.patch_weight * patches
        return terms

    def parameter_groups(self) -> list[dict[str, object]]:
        """Matrices, which have weight decay, and vectors, which have none."""
        parameters, rate = list(self.model.parameters()), self.config.learning_rate
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        return parameter_groups((matrices, rate, self.config.weight_decay), (vectors, rate, 0.0))


def pretrain(config: PretrainingConfig, folder: Path, *, num_workers: int = 1) -> Path:
    """Train a small CLIP, or continue to train it.

    Args:
        config: The run's configuration; it must be the same when the run is resumed.
        folder: Where checkpoints are written and earlier ones are looked for.
        num_workers: Processes that draw scenes; 0 draws in this process.

    Returns:
        The weights, ``clip.safetensors``.

    Raises:
        TrainingError: The loss is not finite, the folder holds a run of another configuration, or
            the disk is full; call again once there is space, and the run continues from its last
            checkpoint.
        CheckpointError: ``config.json`` or the last checkpoint is damaged.
    """
    _check_same_run(config, folder)
    torch.manual_seed(config.seed)
    task = ClipTask(SmallClip(config), config)
    warmup, start = config.warmup, 1 / max(config.warmup, 1)
    rates = ScheduleConfig(name="cosine", min_factor=0.01, warmup_steps=warmup, warmup_start=start)
    result = run_loop(
        task,
        _batch_source(config, num_workers),
        config=LoopConfig(
            iterations=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            checkpoint_interval=config.checkpoint_interval,
            log_interval=20,
        ),
        optimizer=OptimizerConfig(betas=(0.9, 0.98), eps=1e-6, max_grad_norm=1.0),
        schedule=lambda step: rates.factor(step, config.steps),
        run_folder=folder,
        resume=True,
    )
    try:
        _save(task.model.cpu(), folder / WEIGHTS, _provenance(config, result.step))
    except TrainingError as error:
        raise TrainingError(
            f"{error} The training is saved in {result.last_checkpoint}; call again to write the "
            "weights."
        ) from error
    return folder / WEIGHTS


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of the run in a folder, as plain data.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: expected a run's configuration, got nothing. Check the folder."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a run's configuration, got {error}. Write it again as it was, or "
            "choose another folder."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(content).__name__}. Write it again as it "
            "was, or choose another folder."
        )
    return content


def _save(model: SmallClip, path: Path, provenance: dict[str, Any]) -> None:
    from safetensors.torch import save

    weights = {name: value.contiguous() for name, value in model.open_clip_state_dict().items()}
    with writing(path):
        write_whole(path, save(weights, {"provenance": json.dumps(provenance)}))


def _provenance(config: PretrainingConfig, step: int) -> dict[str, Any]:
    return {
        "recipe": "tools.studies.clip_pretraining",
        "config": dataclasses.asdict(config),
        "world_version": WORLD_VERSION,
        "step": step,
        "torch": torch.__version__,
    }


def _check_same_run(config: PretrainingConfig, folder: Path) -> None:
    path = folder / CONFIG
    wanted = dataclasses.asdict(config)
    if not path.is_file():
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(wanted, indent=2) + "\n").encode())
        return
    stored = read_config(folder)
    changed = sorted(key for key in wanted if stored.get(key) != wanted[key])
    if changed:
        raise TrainingError(
            f"{path}: expected the configuration of this run, got another {', '.join(changed)}. "
            "Choose another folder, or remove this one to start again."
        )


def _batch_source(config: PretrainingConfig, num_workers: int) -> BatchSource:
    """Batches from a position on; one process gets a whole batch, as its captions are compared."""

    def batches(
        *, start_position: int, process_index: int, num_processes: int, batch_size: int
    ) -> Iterator[CaptionBatch]:
        if num_processes != 1 or batch_size != config.batch_size:
            raise ArgumentError(
                f"num_processes: expected 1 with whole batches, got {num_processes}. The loss "
                "compares all captions of a batch; start one process."
            )
        loader = DataLoader(
            CaptionBatches(
                steps=config.steps,
                seed=config.seed,
                batch_size=config.batch_size,
                view_size=config.view_size,
                size=config.size,
                whole_every=config.whole_every,
                context_length=config.context_length,
            ),
            batch_size=None,
            sampler=range(start_position // batch_size, config.steps),
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # otherwise it draws from the one that a checkpoint saves
        )
        with one_opencv_thread():  # workers start here
            return iter(loader)

    return batches


def main() -> int:
    """Read the command line and train; an error is one line and exit code 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--threads", type=int, default=2, help="threads for torch")
    for setting in dataclasses.fields(PretrainingConfig):
        kind = int if setting.default is None else type(setting.default)
        parser.add_argument(
            f"--{setting.name.replace('_', '-')}", type=kind, default=setting.default
        )
    arguments = vars(parser.parse_args())
    out, threads = arguments.pop("out"), arguments.pop("threads")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    try:
        _log.info("weights: %s", pretrain(PretrainingConfig(**arguments), out))
    except ZssegError as error:
        _log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
