"""From a name to a bundle: cheap checks, weights, export with verification, cleaning up."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    compares it with what it was made from before it gets its name; this takes no
    torch. A download that was interrupted goes on where it stopped. A weights
    file that this call or an earlier one downloaded is removed afterwards; one that was put there
    by hand, or lies in the Hugging Face cache, stays.

    Args:
        name: One of :data:`SETS`, or with a smaller input behind it: ``"naclip-b16-336"``.
        overwrite: Whether to make a bundle again that is there.
        keep_checkpoint: Whether to keep the downloaded weights file.
        progress: Hears what happens; None tells nobody.

    Returns:
        The bundle's folder, in ``$ZSSEG_HOME/bundles``.

    Raises:
        ArgumentError: The name is unknown; the message lists the names.
        BackendUnavailableError: A package of the extra ``tips`` for TIPS is not installed.
        FetchError: The file cannot be had, or is not the published one.
        BundleError: The bundle disagrees with what it was made from.
    """
    chosen, told = known_set(name), progress or Progress()
    place = bundle_place(name)
    with _alone():
        if place.exists() and not overwrite:
            _check_fetched(place, name)
            told.say(f"{name} is here already: {place}")
            return place
        if chosen.architecture == "tips" and importlib.util.find_spec("sentencepiece") is None:
            raise BackendUnavailableError(
                "sentencepiece: expected to be installed to fetch and export, got nothing. "
                f"Run: {install_command('tips')}"
            )
        check_free_space(chosen, place.parent, 0)
        found = find_checkpoints(chosen, told)
        told.say("exporting the bundle in float32 and float16, then checking it")
        _export(chosen, found, place, told)
        size = sum(file.stat().st_size for file in place.iterdir())
        told.say(f"wrote {place} ({megabytes(size)}). {_settle(found, keep_checkpoint)}")
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


def _export(
    chosen: PretrainedSet, found: Sequence[Checkpoint], place: Path, told: Progress
) -> None:
    paths, size_hw = [checkpoint.path for checkpoint in found], (chosen.size, chosen.size)
    options: dict[str, Any] = {
        "source": ", ".join(checkpoint.origin for checkpoint in found),
        "licence": chosen.licence,
        "overwrite": True,
    }

    def check(count: int, within: float = 0.0) -> None:
        if abs(count - chosen.num_parameters) > within * chosen.num_parameters:
            raise CheckpointError(
                f"{paths[0].name}: expected {chosen.num_parameters} numbers in the model, got "
                f"{count}."
            )

    try:
        if chosen.architecture == "cat_seg":
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
        elif chosen.architecture == "tips":
            from zsseg_rt.export.architectures.tips import TipsSettings, export_tips_files

            vision, text, tokenizer = paths
            export_tips_files(
                vision,
                text,
                place,
                TipsSettings(size_hw=size_hw),
                # positions may be stored for another grid: less than 1 % of the numbers
                check=lambda weights: check(weights.num_parameters, within=0.01),
                on_progress=told.computed,
                tokenizer=tokenizer,
                space=chosen.clip,
                **options,
            )
        else:
            _export_clip(chosen, paths, place, told, check, options)
    except CheckpointError as exc:
        raise FetchError(
            f"{paths[0]}: expected the weights of {chosen.clip} {chosen.tag}, got a file "
            f"that does not hold them: {exc} Remove it, then run: zsseg-rt fetch {chosen.name}"
        ) from exc


def _export_clip(
    chosen: PretrainedSet,
    paths: Sequence[Path],
    place: Path,
    told: Progress,
    check: Callable[[int], None],
    options: dict[str, Any],
) -> None:
    from zsseg_rt.export.clip_file import DenseHead, export_clip_file
    from zsseg_rt.torch_files.clip_space import describe_space

    own = chosen.head.startswith("value")  # a space that is no CLIP's
    size_hw = (chosen.size, chosen.size)
    export_clip_file(
        paths[0],
        place,
        DenseHead(head=chosen.head, size_hw=size_hw, activation=chosen.activation),
        check=lambda weights: check(weights.num_parameters),
        on_progress=told.computed,
        space=chosen.clip if own else describe_space(chosen.tag, chosen.clip),
        **options,
        **({"tokenizer": paths[1]} if len(paths) > 1 else {}),
    )


def _settle(found: Sequence[Checkpoint], keep: bool) -> str:
    size = megabytes(sum(checkpoint.path.stat().st_size for checkpoint in found))
    if keep or not all(checkpoint.ours for checkpoint in found):
        place = found[0].path
        return f"The weights ({size}) stay in {place if len(found) == 1 else place.parent}."
    for checkpoint in found:
        checkpoint.remove()
    return f"The downloaded weights ({size}) were removed; --keep-checkpoint keeps them."
