"""Get a set's weights file: one that is here already, or the rest of a download."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from zsseg_rt.bundles.pretrained import PretrainedSet, checkpoint_folder
from zsseg_rt.common.files import read_limited, sha256_of, why_unwritable, write_whole
from zsseg_rt.common.schema import parse_json
from zsseg_rt.errors import FetchError
from zsseg_rt.fetch import hub
from zsseg_rt.fetch.progress import Progress

_MAX_RECORD_BYTES = 1 << 16
# The image tower in float32 and float16, the text tower in float32: 1.25 times the weights of
# ViT-B/16, 1.36 times those of ViT-L/14; and some room.
_BUNDLE_PER_WEIGHTS = 1.45


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A weights file on this disk.

    Attributes:
        path: The file.
        origin: Where it comes from, for the bundle's provenance.
        ours: Whether this package downloaded it, so that it may remove it again.
    """

    path: Path
    origin: str
    ours: bool

    def remove(self) -> None:
        """Remove the file, and the note of its download."""
        self.path.unlink(missing_ok=True)
        _record_of(self.path).unlink(missing_ok=True)


def find_checkpoints(chosen: PretrainedSet, progress: Progress) -> list[Checkpoint]:
    """All files of a set that needs all of them, else the one that there is."""
    wanted = [(file,) for file in chosen.files] if chosen.all_files else [chosen.files]
    return [find_checkpoint(replace(chosen, files=files), progress) for files in wanted]


def find_checkpoint(chosen: PretrainedSet, progress: Progress) -> Checkpoint:
    """The weights file: put there by hand, in the Hugging Face cache, or downloaded now."""
    folder = checkpoint_folder(chosen.repository)
    for file in chosen.files:
        if (folder / Path(file).name).is_file():
            return _local(chosen, file, folder / Path(file).name, progress)
    for copy, sha256 in hub.cached_copies(chosen.repository, chosen.files, chosen.revision):
        if sha256_of(copy) == chosen.sha256.get(copy.name, sha256):
            progress.say(f"using {copy}, which the Hugging Face cache has")
            return Checkpoint(path=copy, origin=f"{chosen.repository} {copy.name}", ours=False)
        progress.say(f"{copy} in the Hugging Face cache is damaged and not used")
    try:
        remote = hub.look_up(chosen.repository, chosen.files, chosen.revision)
    except hub.HubError as exc:
        raise _by_hand(chosen, chosen.files[0], None, str(exc)) from exc
    pinned = _pinned(chosen, remote)
    if remote.sha256 not in (None, pinned.sha256):
        raise FetchError(
            f"{chosen.name}: expected {remote.file} with the sha256 {str(pinned.sha256)[:12]}..., "
            f"which is known, got {str(remote.sha256)[:12]}... from the hub. "
            "Nothing was downloaded. If HF_ENDPOINT names a mirror, try without it; else report it."
        )
    return _download(chosen, pinned, folder / Path(remote.file).name, progress)


def check_free_space(chosen: PretrainedSet, folder: Path, download_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    problem = why_unwritable(folder)
    if problem:
        raise FetchError(
            f"{folder}: expected a folder that can be written to, got: {problem}. "
            "Set ZSSEG_HOME to another one."
        )
    existing = next(one for one in (folder, *folder.parents) if one.is_dir())
    needed = download_bytes + int(_BUNDLE_PER_WEIGHTS * chosen.weight_bytes)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise FetchError(
            f"{folder}: expected {megabytes(needed)} of free space for the file and the bundle, "
            f"got {megabytes(free)}. Free some, or set ZSSEG_HOME to another folder."
        )


def megabytes(count: int) -> str:
    """Bytes in decimal MB, as the hub shows them."""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _local(chosen: PretrainedSet, file: str, path: Path, progress: Progress) -> Checkpoint:
    """A file that lies where downloads go: compared with its note, or else with the hub."""
    record = _read_record(path)
    known = record or _ask_about(chosen, file, path, progress)
    known = known and _pinned(chosen, known)
    if known is not None:
        _compare(path, known, f"Remove {path}, then run: zsseg-rt fetch {chosen.name}")
    progress.say(f"using {path}")
    where = known.commit[:12] if known else "put there by hand"
    origin = f"{chosen.repository} {path.name} ({where})"
    return Checkpoint(path=path, origin=origin, ours=record is not None)


def _pinned(chosen: PretrainedSet, remote: hub.RemoteFile) -> hub.RemoteFile:
    """The file with the SHA-256 that is known here, if it is."""
    return replace(remote, sha256=chosen.sha256.get(remote.file, remote.sha256))


def _ask_about(
    chosen: PretrainedSet, file: str, path: Path, progress: Progress
) -> hub.RemoteFile | None:
    if sha256 := chosen.sha256.get(path.name):
        return hub.RemoteFile(
            repository=chosen.repository,
            file=path.name,
            commit=chosen.revision,
            size=None,
            sha256=sha256,
        )
    try:
        return hub.look_up(chosen.repository, [file], chosen.revision)
    except hub.HubError as exc:
        progress.say(f"{path} cannot be compared with the published file: {exc}")
        return None


def _download(
    chosen: PretrainedSet, remote: hub.RemoteFile, path: Path, progress: Progress
) -> Checkpoint:
    partial = _partial_of(path, remote)
    done = _length(partial)
    size = chosen.weight_bytes if remote.size is None else remote.size
    check_free_space(chosen, path.parent, max(0, size - done))
    rest = f", {megabytes(done)} of which are here from an earlier try" if done else ""
    progress.say(
        f"downloading {hub.address_of(remote.repository, remote.file, chosen.revision)} "
        f"({size} bytes{rest}; licence: {chosen.licence})"
    )
    try:
        # an estimate of the size is that of the weights, without what surrounds them
        most = 2 * size if remote.size is None else size
        _download_rest(remote, partial, most, progress)
    except hub.HubError as exc:
        came = _length(partial)
        problem = f"{exc} after {came} bytes, which are kept; run again to continue"
        raise _by_hand(chosen, remote.file, remote.size, problem if came else str(exc)) from exc
    try:
        _compare(partial, remote, f"It was removed. Run again: zsseg-rt fetch {chosen.name}")
    except FetchError:
        partial.unlink(missing_ok=True)
        raise
    _put_in_place(partial, path, remote)
    origin = f"{chosen.repository} {path.name} ({remote.commit[:12]})"
    return Checkpoint(path=path, origin=origin, ours=True)


def _download_rest(remote: hub.RemoteFile, partial: Path, most: int, progress: Progress) -> None:
    """Go on after broken connections as long as more comes."""
    while True:
        before = _length(partial)
        try:
            return hub.download(remote, partial, most, progress.downloaded)
        except hub.HubError:
            if _length(partial) <= before or remote.size is None:
                raise


def _partial_of(path: Path, remote: hub.RemoteFile) -> Path:
    """The partial file of exactly this content; those of other contents are removed."""
    partial = path.with_name(f"{path.name}.{(remote.sha256 or remote.commit)[:12]}.partial")
    for other in path.parent.glob(f"{path.name}.*.partial"):
        if other != partial or remote.size is None or _length(other) > remote.size:
            other.unlink()
    return partial


def _put_in_place(partial: Path, path: Path, remote: hub.RemoteFile) -> None:
    try:
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
        write_whole(_record_of(path), json.dumps(asdict(remote), indent=2).encode())
    except OSError as exc:
        raise FetchError(
            f"{path}: cannot be written: {exc.strerror or exc}. Check the folder {path.parent}."
        ) from exc


def _compare(path: Path, expected: hub.RemoteFile, remedy: str) -> None:
    """Refuse a file that is not the published one."""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        raise FetchError(f"{path}: expected {expected.size} bytes, got {size}. {remedy}")
    if expected.sha256 is None:
        return
    found = sha256_of(path)
    if found != expected.sha256:
        raise FetchError(
            f"{path}: expected the published file, whose sha256 is {expected.sha256[:12]}..., got "
            f"{found[:12]}.... {remedy}"
        )


def _by_hand(chosen: PretrainedSet, file: str, size: int | None, problem: str) -> FetchError:
    """How to go on without the network, in one line."""
    folder = checkpoint_folder(chosen.repository)
    with suppress(OSError):  # so that the file can be put there
        folder.mkdir(parents=True, exist_ok=True)
    shown = f"{size} bytes" if size is not None else f"about {megabytes(chosen.weight_bytes)}"
    return FetchError(
        f"{chosen.name}: expected to download {file} ({shown}) from "
        f"{hub.address_of(chosen.repository, file, chosen.revision)}, got {problem}. To do it by "
        f"hand, put the file into {folder}, then run: zsseg-rt fetch {chosen.name}"
    )


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_record(path: Path) -> hub.RemoteFile | None:
    """The note that a finished download left; None if there is none, or it is damaged."""
    try:
        raw = parse_json(read_limited(_record_of(path), max_bytes=_MAX_RECORD_BYTES))
        return hub.RemoteFile(**raw)
    except (OSError, ValueError, TypeError):
        return None


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
