"""Losses of a batch that two processes share: their mean is the loss of the whole batch."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from zsseg_rt.models.zegformer.decoder import Segments  # noqa: E402
from zsseg_rt.training.tasks.losses import cross_entropy, mask_losses  # noqa: E402
from zsseg_rt.training.tasks.zegformer import (  # noqa: E402
    SegmentWeights,
    class_masks,
    match_segments,
    segment_losses,
)

NUM_CLASSES = 5


def losses_of(part: slice) -> list[float]:
    """Of some of four pictures, which have very different shares of labelled pixels and classes."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, NUM_CLASSES, 6, 6, generator=generator)
    labels = torch.full((4, 6, 6), 255)
    labels[0] = torch.arange(36).view(6, 6) % NUM_CLASSES
    labels[1, :2], labels[3, 0, 0] = 3, 1
    logits, labels = logits[part], labels[part]
    segments = Segments(logits.flatten(2)[:, :, : NUM_CLASSES + 1], logits)
    targets = class_masks(labels, NUM_CLASSES)
    matches = match_segments(segments, targets, SegmentWeights())
    made = segment_losses(segments, targets, matches, no_object=0.1)
    terms = [*mask_losses(logits, labels), cross_entropy(logits, labels), made.focal, made.dice]
    return [term.item() for term in terms]


def one_of_two(rank: int, folder: str) -> None:
    address = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(losses_of(slice(2 * rank, 2 * rank + 2)), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_mean_of_two_processes_is_the_loss_of_the_whole_batch(tmp_path):
    whole = losses_of(slice(None))
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    means = [sum(pair) / 2 for pair in zip(*parts, strict=True)]
    assert means == pytest.approx(whole, rel=1e-5)
    assert parts[0] != pytest.approx(parts[1], rel=0.1)
