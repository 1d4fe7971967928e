"""Get a set's weights file: one that is here already, or the rest of a download."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from zsseg_rt.bundles.pretrained import PretrainedSet, checkpoint_folder
from zsseg_rt.common.files import read_limited, sha256_of, why_unwritable, write_whole
from zsseg_rt.common.schema import parse_json
from zsseg_rt.errors import FetchError

_MAX_RECORD_BYTES = 1 << 16
# The image tower in float32 and float16, the text tower in float32: 1.25 times the weights of
# ViT-B/16, 1.47 times the float16 ones of TinyCLIP-39M; and some room.
_BUNDLE_PER_WEIGHTS = 1.5


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A weights file on this disk."""

    path: Path  # The file
    origin: str  # Where it comes from, for the bundle's provenance
    ours: bool  # Whether this package downloaded it, so that it may remove it again

    def remove(self) -> None:
        """Remove the file, and the note of its download."""
        self.path.unlink(missing_ok=True)
        _record_of(self.path).unlink(missing_ok=True)


def find_checkpoints(weights: PretrainedSet, progress: Progress) -> list[Checkpoint]:
    """The files of a set: put there by hand, in the Hugging Face cache, or downloaded now."""
    return [_find(weights, file, progress) for file in weights.files]


def _find(weights: PretrainedSet, file: str, progress: Progress) -> Checkpoint:
    path = checkpoint_folder(weights.repository) / Path(file).name
    if path.is_file():
        return _local(weights, file, path, progress)
    if cached := _cached_copy(weights.repository, file, weights.revision):
        copy, sha256 = cached
        if sha256_of(copy) == weights.sha256.get(copy.name, sha256):
            progress.say(f"using {copy}, which the Hugging Face cache has")
            return Checkpoint(path=copy, origin=f"{weights.repository} {copy.name}", ours=False)
        progress.say(f"{copy} in the Hugging Face cache is damaged and not used")
    try:
        remote = look_up(weights.repository, file, weights.revision)
    except HubError as exc:
        size = f"about {megabytes(weights.weight_bytes)}"
        raise _by_hand(weights, file, size, str(exc)) from exc
    pinned = _pinned(weights, remote)
    if remote.sha256 not in (None, pinned.sha256):
        raise FetchError(
            f"{weights.name}: expected {remote.file} with the sha256 {str(pinned.sha256)[:12]}..., "
            f"which is known, got {str(remote.sha256)[:12]}... from the hub. "
            "Nothing was downloaded. If HF_ENDPOINT names a mirror, try without it; else report it."
        )
    return _download(weights, pinned, path, progress)


def check_free_space(weights: PretrainedSet, folder: Path, download_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    problem = why_unwritable(folder)
    if problem:
        raise FetchError(
            f"{folder}: expected a folder that can be written to, got: {problem}. "
            "Set ZSSEG_HOME to another one."
        )
    existing = next(one for one in (folder, *folder.parents) if one.is_dir())
    needed = download_bytes + int(_BUNDLE_PER_WEIGHTS * weights.weight_bytes)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise FetchError(
            f"{folder}: expected {megabytes(needed)} of free space for the file and the bundle, "
            f"got {megabytes(free)}. Free some, or set ZSSEG_HOME to another folder."
        )


def megabytes(count: int) -> str:
    """Bytes in decimal MB, as the hub shows them."""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _local(weights: PretrainedSet, file: str, path: Path, progress: Progress) -> Checkpoint:
    """A file that lies where downloads go: compared with its note, or else with what is known."""
    published = record = _read_record(path)
    if record is None and path.name in weights.sha256:
        published = RemoteFile(
            repository=weights.repository, file=path.name, commit=weights.revision
        )
    elif record is None:
        try:
            published = look_up(weights.repository, file, weights.revision)
        except HubError as exc:
            progress.say(f"{path} cannot be compared with the published file: {exc}")
    if published is not None:
        _compare(path, _pinned(weights, published), f"Remove {path}, then run this again.")
    progress.say(f"using {path}")
    where = published.commit[:12] if published else "put there by hand"
    origin = f"{weights.repository} {path.name} ({where})"
    return Checkpoint(path=path, origin=origin, ours=record is not None)


def _pinned(weights: PretrainedSet, remote: RemoteFile) -> RemoteFile:
    """The file with the SHA-256 that is known here, if it is."""
    return replace(remote, sha256=weights.sha256.get(remote.file, remote.sha256))


def _download(
    weights: PretrainedSet, remote: RemoteFile, path: Path, progress: Progress
) -> Checkpoint:
    partial = _partial_of(path, remote)
    done = _length(partial)
    size = remote.size or 0
    check_free_space(weights, path.parent, max(0, size - done))
    rest = f", {megabytes(done)} of which are here from an earlier try" if done else ""
    progress.say(
        f"downloading {address_of(remote.repository, remote.file, weights.revision)} "
        f"({size} bytes{rest}; licence: {weights.licence})"
    )
    while True:  # after broken connections, as long as more comes
        before = _length(partial)
        try:
            _append(remote, partial, progress.downloaded)
            break
        except HubError as exc:
            if (came := _length(partial)) > before:
                continue
            so_far = f" after {came} bytes, which are kept; run again to continue" if came else ""
            raise _by_hand(weights, remote.file, f"{size} bytes", f"{exc}{so_far}") from exc
    try:
        _compare(partial, remote, "It was removed. Run this again.")
    except FetchError:
        partial.unlink(missing_ok=True)
        raise
    with writing(path.parent):
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
        write_whole(_record_of(path), json.dumps(asdict(remote), indent=2).encode())
    origin = f"{weights.repository} {path.name} ({remote.commit[:12]})"
    return Checkpoint(path=path, origin=origin, ours=True)


def _partial_of(path: Path, remote: RemoteFile) -> Path:
    """The partial file of exactly this content; those of other contents are removed."""
    partial = path.with_name(f"{path.name}.{(remote.sha256 or remote.commit)[:12]}.partial")
    for other in path.parent.glob(f"{path.name}.*.partial"):
        if other != partial or _length(other) > (remote.size or 0):
            other.unlink()
    return partial


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say of what cannot be written in the block where it belongs."""
    try:
        yield
    except OSError as exc:
        raise FetchError(
            f"{folder}: cannot be written: {exc.strerror or exc}. Free space there, or set "
            "ZSSEG_HOME to another folder, and run it again: what came so far is kept."
        ) from exc


def _compare(path: Path, expected: RemoteFile, remedy: str) -> None:
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        raise FetchError(f"{path}: expected {expected.size} bytes, got {size}. {remedy}")
    if expected.sha256 is None:
        return
    sha256 = sha256_of(path)
    if sha256 != expected.sha256:
        raise FetchError(
            f"{path}: expected the published file, whose sha256 is {expected.sha256[:12]}..., got "
            f"{sha256[:12]}.... {remedy}"
        )


def _by_hand(weights: PretrainedSet, file: str, size: str, problem: str) -> FetchError:
    """How to go on without the network, in one line."""
    folder = checkpoint_folder(weights.repository)
    with suppress(OSError):  # so that the file can be put there
        folder.mkdir(parents=True, exist_ok=True)
    return FetchError(
        f"{weights.name}: expected to download {file} ({size}) from "
        f"{address_of(weights.repository, file, weights.revision)}, got {problem}. To do it by "
        f"hand, put the file into {folder}, then run this again."
    )


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_record(path: Path) -> RemoteFile | None:
    """The note that a finished download left; None if there is none, or it is damaged."""
    try:
        raw = parse_json(read_limited(_record_of(path), max_bytes=_MAX_RECORD_BYTES))
        return RemoteFile(**raw)
    except (OSError, ValueError, TypeError):
        return None


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class Progress:
    """Hears what happens; this one ignores it, a subclass may show it."""

    def say(self, text: str) -> None:
        """Something worth a line happened; the text has no line break."""

    def downloaded(self, done: int, total: int | None) -> None:
        """So many bytes of ``total`` (None: unknown) are here; told in the thread that fetches."""


_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOUD = ("huggingface_hub", "httpx", "httpx2", "urllib3")


class HubError(Exception):
    """The hub did not give what it was asked for; the message is a phrase, without addresses."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on the hub."""

    repository: str  # owner/name, or the address of a folder
    file: str  # Its name there
    # The commit that was asked, so that all parts come from the same file; of a plain address, a
    # digest of what its server calls this version
    commit: str
    # Bytes; None of a file that was put there by hand and is compared by its hash alone
    size: int | None = None
    sha256: str | None = None  # In hex; None if the hub does not say


def address_of(repository: str, file: str, revision: str = "main") -> str:
    """The address that a browser can download the file from; shows no password."""
    parts = urlsplit(_url(repository, file, revision))
    return str(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))


def _append(remote: RemoteFile, partial: Path, on_bytes: Callable[[int, int | None], None]) -> None:
    """Append what is missing of a file; never more than its size is written in all."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    assert remote.size is not None
    with writing(partial.parent):
        partial.parent.mkdir(parents=True, exist_ok=True)
        stream = partial.open("ab")
    with stream:
        done = stream.tell()
        on_bytes(done, remote.size)
        if done == remote.size:
            return
        target = _Counted(stream, partial, remote.size, lambda count: on_bytes(count, remote.size))
        login = {} if is_address(remote.repository) else build_hf_headers(library_name="zsseg_rt")
        with _errors_as_phrases():
            http_get(
                _url(remote.repository, remote.file, remote.commit),
                target,
                resume_size=done,
                headers={**login, "Accept-Encoding": "identity"},
                expected_size=remote.size,
            )


def _cached_copy(repository: str, file: str, revision: str) -> tuple[Path, str] | None:
    """The copy in the Hugging Face cache, whose name says its SHA-256."""
    from huggingface_hub import try_to_load_from_cache

    if is_address(repository):
        return None
    name, kind = _place(repository)
    copy = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
    blob = Path(copy).resolve() if isinstance(copy, str) else None
    if blob is None or not blob.is_file() or not _SHA256.fullmatch(blob.name):
        return None
    return Path(str(copy)), blob.name


def _place(repository: str) -> tuple[str, str | None]:
    """``owner/name``, and the kind of repository that the hub's library asks for."""
    name = repository.removeprefix("spaces/")
    return name, None if name == repository else "space"


def is_address(repository: str) -> bool:
    """Whether it is a folder on a plain server, not a repository on the hub."""
    return "://" in repository


def _url(repository: str, file: str, revision: str) -> str:
    from huggingface_hub import hf_hub_url

    if is_address(repository):
        return f"{repository}/{file}"
    name, kind = _place(repository)
    return str(hf_hub_url(name, file, repo_type=kind, revision=revision))


def look_up(repository: str, file: str, revision: str) -> RemoteFile:
    """Ask for size and hash; a plain server states a size, and its own name of the version."""
    from huggingface_hub import get_hf_file_metadata

    plain = is_address(repository)
    with _errors_as_phrases():
        # a login is for the hub alone
        metadata = get_hf_file_metadata(
            _url(repository, file, revision), token=False if plain else None
        )
    commit, etag = metadata.commit_hash or "", metadata.etag or ""
    if plain:
        commit = hashlib.sha256(f"{etag} {metadata.size}".encode()).hexdigest()[:40]
    if not _COMMIT.fullmatch(commit):
        raise HubError("an answer that does not come from a Hugging Face Hub")
    if _COMMIT.fullmatch(revision) and commit != revision and not plain:
        raise HubError(f"commit {commit[:12]} for the pinned {revision[:12]}")
    if metadata.size is None:
        raise HubError("an answer without a size, not a file")
    return RemoteFile(
        repository=repository,
        file=file,
        commit=commit,
        size=metadata.size,
        sha256=etag if _SHA256.fullmatch(etag) and not plain else None,
    )


class _Counted:
    """A file of bounded length that tells it, and keeps errors of the disk apart."""

    def __init__(
        self, stream: IO[bytes], path: Path, most: int, on_bytes: Callable[[int], None]
    ) -> None:
        self._stream, self._path, self._most, self._on_bytes = stream, path, most, on_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: bytes) -> int:
        if self._stream.tell() + len(data) > self._most:
            self._path.unlink()
            raise FetchError(
                f"{self._path.name}: expected {self._most} bytes at most, as was announced, got "
                "more, or content that is packed. It was removed. If HF_ENDPOINT or a proxy names "
                "a mirror, try without it; else report it."
            )
        with writing(self._path.parent):
            count = self._stream.write(data)
            self._stream.flush()
        self._on_bytes(self._stream.tell())
        return count


@contextmanager
def _errors_as_phrases() -> Iterator[None]:
    """Turn what the hub's library raises into a :class:`HubError`, and keep it from printing."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # Its own errors derive from the base of all errors of the HTTP library that it uses.
    network_errors = (*HfHubHTTPError.__bases__, OSError)
    with _silence():
        try:
            yield
        except OfflineModeIsEnabled as exc:
            raise HubError("HF_HUB_OFFLINE=1, which forbids any connection") from exc
        except HfHubHTTPError as exc:
            raise _refusal(exc) from exc
        except network_errors as exc:
            broken = "a transfer of another length than announced"
            plain = type(exc) is OSError
            raise HubError(broken if plain else f"no connection ({type(exc).__name__})") from exc


_NO_LOGIN = ", the hub does not let you have it; if it needs a login, set HF_TOKEN"
_REFUSALS = {404: ", there is no such file", 401: _NO_LOGIN, 403: _NO_LOGIN}


def _refusal(error: Any) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if not status:
        return HubError(f"no connection ({type(error).__name__})")
    trouble = ", the hub is in trouble; try again later" if status >= 500 else ""
    return HubError(f"HTTP {status}{_REFUSALS.get(status, trouble)}")


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the hub's library from printing warnings, signed addresses and a bar of its own."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    levels = {logger: logger.level for logger in map(logging.getLogger, _LOUD)}
    had_bars = not are_progress_bars_disabled()
    for logger in levels:
        logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if had_bars:
            enable_progress_bars()
