"""From a name to a bundle: cheap checks, weights, export with verification, cleaning up."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zsseg_rt.backends.cache_lock import locked
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.pretrained import PretrainedSet, bundle_place, known_set
from zsseg_rt.common.extras import install_command
from zsseg_rt.common.files.home import default_cache_dir
from zsseg_rt.errors import BackendUnavailableError, BundleError, CheckpointError, FetchError
from zsseg_rt.fetch.checkpoints import Checkpoint, check_free_space, find_checkpoint, megabytes
from zsseg_rt.fetch.progress import Progress

_NEEDED = ("torch", "open_clip", "huggingface_hub", "onnx", "onnxscript")


def fetch_bundle(
    name: str,
    *,
    overwrite: bool = False,
    keep_checkpoint: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Make the bundle of a name available to ``Engine(name)`` and ``--bundle NAME``.

    Downloads the weights unless they are here, exports the bundle in float32 and float16, and
    compares it with torch before it gets its name. A download that was interrupted goes on where it
    stopped. A weights file that this call or an earlier one downloaded is removed afterwards; one
    that was put there by hand, or lies in the Hugging Face cache, stays.

    Args:
        name: One of :data:`SETS`.
        overwrite: Whether to make a bundle again that is there.
        keep_checkpoint: Whether to keep the downloaded weights file.
        progress: Hears what happens; None tells nobody.

    Returns:
        The bundle's folder, in ``$ZSSEG_HOME/bundles``.

    Raises:
        ArgumentError: The name is unknown; the message lists the names.
        BackendUnavailableError: A package of the extra ``train`` is not installed.
        FetchError: The file cannot be had, or is not the published one.
        BundleError: The bundle disagrees with torch.
    """
    chosen, told = known_set(name), progress or Progress()
    place = bundle_place(name)
    with _alone():
        if place.exists() and not overwrite:
            _check_fetched(place, name)
            told.say(f"{name} is here already: {place}")
            return place
        _check_packages()
        check_free_space(chosen, place.parent, 0)
        checkpoint = find_checkpoint(chosen, told)
        told.say("exporting the bundle in float32 and float16, then comparing it with torch")
        _export(chosen, checkpoint, place, told)
        size = sum(file.stat().st_size for file in place.iterdir())
        told.say(f"wrote {place} ({megabytes(size)}). {_settle(checkpoint, keep_checkpoint)}")
    return place


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process at a time fetch: two names may need the same file."""
    home = default_cache_dir()
    lock = locked(home / "fetch.lock")
    try:
        lock.__enter__()
    except OSError as exc:
        raise FetchError(
            f"{home}: expected a folder that can be written to, got: {exc.strerror or exc}. "
            "Set ZSSEG_HOME to another one."
        ) from exc
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _check_fetched(place: Path, name: str) -> None:
    try:
        Bundle.load(place).verify()
    except BundleError as exc:
        raise FetchError(f"{exc} Or make it again: zsseg-rt fetch {name} --overwrite") from exc


def _check_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"{', '.join(missing)}: expected to be installed to fetch and export, got nothing. "
            f"Run: {install_command('train')}"
        )


def _export(chosen: PretrainedSet, checkpoint: Checkpoint, place: Path, told: Progress) -> None:
    from zsseg_rt.export import export_bundle
    from zsseg_rt.torch_files.clip_space import describe_space

    # a system of its own knows its space
    plain = chosen.architecture == "dense_clip"
    space = {"space": describe_space(chosen.tag, chosen.clip)} if plain else {}
    try:
        model = _build(chosen, checkpoint.path)
    except CheckpointError as exc:
        raise FetchError(
            f"{checkpoint.path}: expected the weights of {chosen.clip} {chosen.tag}, got a file "
            f"that does not hold them: {exc} Remove it, then run: zsseg-rt fetch {chosen.name}"
        ) from exc
    export_bundle(
        model,
        place,
        source=checkpoint.origin,
        licence=chosen.licence,
        overwrite=True,
        **space,
    )


def _build(chosen: PretrainedSet, path: Path) -> Any:
    from zsseg_rt.models import create_model, from_official, load_checkpoint, normalize_state_dict

    if chosen.architecture == "dense_clip":
        model = create_model(
            "dense_clip",
            pretrained=path,
            clip=chosen.clip,
            head=chosen.head,
            image_size=chosen.size,
            activation=chosen.activation,
        )
    else:
        weights = normalize_state_dict(load_checkpoint(path))
        model = from_official(chosen.architecture, weights)
    count = sum(weight.numel() for weight in model.parameters())
    if count != chosen.num_parameters:
        raise CheckpointError(
            f"{path.name}: expected {chosen.num_parameters} numbers in the model, got {count}."
        )
    return model


def _settle(checkpoint: Checkpoint, keep: bool) -> str:
    size = megabytes(checkpoint.path.stat().st_size)
    if keep or not checkpoint.ours:
        return f"The weights ({size}) stay in {checkpoint.path}."
    checkpoint.remove()
    return f"The downloaded weights ({size}) were removed; --keep-checkpoint keeps them."
