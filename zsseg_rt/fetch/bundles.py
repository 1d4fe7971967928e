"""From a name to a bundle: cheap checks, weights, export with verification, cleaning up."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.pretrained import PretrainedSet, bundle_place, known_set
from zsseg_rt.common.extras import install_command
from zsseg_rt.common.files import default_cache_dir, locked
from zsseg_rt.errors import BackendUnavailableError, BundleError, CheckpointError, FetchError
from zsseg_rt.fetch.checkpoints import (
    Checkpoint,
    Progress,
    check_free_space,
    find_checkpoints,
    megabytes,
    writing,
)


def fetch_bundle(
    name: str,
    *,
    overwrite: bool = False,
    keep_checkpoint: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Make the bundle of a name available to ``Engine(name)`` and ``--bundle NAME``.

    Downloads the weights unless they are here, exports the bundle in float32 and float16, and
    compares it with what it was made from before it gets its name, all without torch. A download
    that was interrupted goes on where it stopped. What was downloaded here is removed afterwards;
    what was put there by hand, or lies in the Hugging Face cache, stays.

    Args:
        name: One of :data:`SETS`, or with a smaller input behind it: ``"naclip-b16-336"``.
        overwrite: Whether to make a bundle again that is there.
        keep_checkpoint: Whether to keep the downloaded weights file.
        progress: Hears what happens.

    Returns:
        The bundle's folder, in ``$ZSSEG_HOME/bundles``.

    Raises:
        ArgumentError: The name is unknown; the message lists the names.
        BackendUnavailableError: A package of the extra ``tips`` for TIPS is not installed.
        FetchError: The file cannot be had, or is not the published one.
        BundleError: The bundle disagrees with what it was made from.
    """
    weights, progress = known_set(name), progress or Progress()
    place = bundle_place(name)
    with _alone():
        if place.exists() and not overwrite:
            _check_fetched(place, name)
            progress.say(f"{name} is here already: {place}")
            return place
        if weights.architecture == "tips" and importlib.util.find_spec("sentencepiece") is None:
            raise BackendUnavailableError(
                "sentencepiece: expected to be installed to fetch and export, got nothing. "
                f"Run: {install_command('tips')}"
            )
        check_free_space(weights, place.parent, 0)
        checkpoints = find_checkpoints(weights, progress)
        progress.say("exporting the bundle in float32 and float16, then checking it")
        _export(weights, checkpoints, place)
        size = sum(file.stat().st_size for file in place.iterdir())
        progress.say(f"wrote {place} ({megabytes(size)}). {_settle(checkpoints, keep_checkpoint)}")
    return place


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process at a time fetch: two names may need the same file."""
    home = default_cache_dir()
    with ExitStack() as stack:
        with writing(home):
            stack.enter_context(locked(home / "fetch.lock"))
        yield


def _check_fetched(place: Path, name: str) -> None:
    try:
        Bundle.load(place).verify()
    except BundleError as exc:
        raise FetchError(f"{exc} Or make it again: zsseg-rt fetch {name} --overwrite") from exc


def _check_count(weights: PretrainedSet, path: Path, count: int, within: float = 0.0) -> None:
    expected = weights.num_parameters
    if abs(count - expected) > within * expected:
        raise CheckpointError(
            f"{path.name}: expected {expected} numbers in the model, got {count}."
        )


def _export(weights: PretrainedSet, checkpoints: Sequence[Checkpoint], place: Path) -> None:
    paths, size_hw = [file.path for file in checkpoints], (weights.size, weights.size)
    options: dict[str, Any] = {
        "source": ", ".join(checkpoint.origin for checkpoint in checkpoints),
        "licence": weights.licence,
        "overwrite": True,
    }

    check = partial(_check_count, weights, paths[0])
    try:
        if weights.architecture == "cat_seg":
            from zsseg_rt.export.architectures.cat_seg import export_cat_seg_file

            unread = ("logit_scale", "attn_mask")
            export_cat_seg_file(
                paths[0],
                place,
                check=lambda tensors: check(
                    sum(v.size for key, v in tensors.items() if not key.endswith(unread))
                ),
                **options,
            )
        elif weights.architecture == "tips":
            from zsseg_rt.export.architectures.tips import TipsSettings, export_tips_files

            vision, text, tokenizer = paths
            export_tips_files(
                vision,
                text,
                place,
                TipsSettings(size_hw=size_hw),
                # positions may be stored for another grid: less than 1 % of the numbers
                check=lambda tensors: check(tensors.num_parameters, within=0.01),
                tokenizer=tokenizer,
                space=weights.clip,
                **options,
            )
        else:
            _export_clip(weights, paths, place, check, options)
    except CheckpointError as exc:
        raise FetchError(
            f"{paths[0]}: expected the weights of {weights.clip} {weights.tag}, got a file "
            f"that does not hold them: {exc} Remove it, then run this again."
        ) from exc


def _export_clip(
    weights: PretrainedSet,
    paths: Sequence[Path],
    place: Path,
    check: Callable[[int], None],
    options: dict[str, Any],
) -> None:
    from zsseg_rt.export.clip_file import DenseHead, export_clip_file
    from zsseg_rt.torch_files.clip_arrays import describe_space

    own = weights.head.startswith("value")  # a space that is no CLIP's
    size_hw = (weights.size, weights.size)
    export_clip_file(
        paths[0],
        place,
        DenseHead(head=weights.head, size_hw=size_hw, activation=weights.activation),
        check=lambda tensors: check(tensors.num_parameters),
        space=weights.clip if own else describe_space(weights.tag, weights.clip),
        **options,
        **({"tokenizer": paths[1]} if len(paths) > 1 else {}),
    )


def _settle(checkpoints: Sequence[Checkpoint], keep: bool) -> str:
    size = megabytes(sum(checkpoint.path.stat().st_size for checkpoint in checkpoints))
    if keep or not all(checkpoint.ours for checkpoint in checkpoints):
        place = checkpoints[0].path
        return f"The weights ({size}) stay in {place if len(checkpoints) == 1 else place.parent}."
    for checkpoint in checkpoints:
        checkpoint.remove()
    return f"The downloaded weights ({size}) were removed; --keep-checkpoint keeps them."
