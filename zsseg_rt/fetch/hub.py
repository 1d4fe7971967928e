"""Ask the Hugging Face Hub, or a plain address, about a file; download it or the rest of it.

``hf_hub_download`` itself cannot go on with a download that an earlier process began; its own
transfer, ``http_get``, can, so the file is kept here until it is whole.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from zsseg_rt.errors import FetchError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AS_IT_IS = {"Accept-Encoding": "identity"}
_LOUD = ("huggingface_hub", "httpx", "httpx2", "urllib3")


class HubError(Exception):
    """The hub did not give what it was asked for; the message is a phrase, without addresses.

    Attributes:
        absent: Whether the hub answered that it has no such file.
    """

    def __init__(self, problem: str, *, absent: bool = False) -> None:
        super().__init__(problem)
        self.absent = absent


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on the hub.

    Attributes:
        repository: ``owner/name``, or the address of a folder.
        file: Its name there.
        commit: The commit that was asked, so that all parts come from the same file; of a plain
            address, a digest of what its server calls this version.
        size: Bytes; None if the hub does not say.
        sha256: In hex; None if the hub does not say.
    """

    repository: str
    file: str
    commit: str
    size: int | None
    sha256: str | None


def address_of(repository: str, file: str, revision: str = "main") -> str:
    """The address that a browser can download the file from; shows no password."""
    parts = urlsplit(_url(repository, file, revision))
    return str(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])))


def look_up(repository: str, files: Sequence[str], revision: str) -> RemoteFile:
    """Ask for size and hash of the first file that the repository has at a revision."""
    for file in files[:-1]:
        try:
            return _look_up_one(repository, file, revision)
        except HubError as exc:
            if not exc.absent:
                raise
    return _look_up_one(repository, files[-1], revision)


def download(
    remote: RemoteFile, partial: Path, most: int, on_bytes: Callable[[int, int | None], None]
) -> None:
    """Append what is missing of a file; never more than ``most`` bytes are written in all."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    plain = is_address(remote.repository)
    with _open_partial(partial) as stream:
        done = stream.tell()
        on_bytes(done, remote.size)
        if remote.size is not None and done == remote.size:
            return
        target = _Counted(stream, partial, most, lambda count: on_bytes(count, remote.size))
        # a login is for the hub alone
        headers = {} if plain else build_hf_headers(library_name="zsseg_rt")
        with _errors_as_phrases():
            http_get(
                _url(remote.repository, remote.file, remote.commit),
                target,
                resume_size=done,
                headers={**headers, **_AS_IT_IS},
                expected_size=remote.size,
            )


def cached_copies(
    repository: str, files: Sequence[str], revision: str
) -> Iterator[tuple[Path, str]]:
    """Copies in the Hugging Face cache, whose names say their SHA-256.

    Yields:
        A file and its SHA-256 in hex, not compared yet.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in () if is_address(repository) else files:
        name, kind = _place(repository)
        found = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
        blob = Path(found).resolve() if isinstance(found, str) else None
        if blob is not None and blob.is_file() and _SHA256.fullmatch(blob.name):
            yield Path(str(found)), blob.name


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


def _look_up_address(repository: str, file: str) -> RemoteFile:
    """Ask a plain server, which states a size but no SHA-256."""
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
    from huggingface_hub.utils import get_session, hf_raise_for_status

    with _errors_as_phrases():
        url = _url(repository, file, "")
        found = get_session().head(url, headers=_AS_IT_IS, timeout=HF_HUB_ETAG_TIMEOUT)
        hf_raise_for_status(found)
    length = found.headers.get("Content-Length", "")
    if found.status_code != 200 or not length.isdecimal():
        raise HubError(f"HTTP {found.status_code} without a size, not a file")
    version = f"{found.headers.get('ETag')} {length}"
    return RemoteFile(
        repository=repository,
        file=file,
        commit=hashlib.sha256(version.encode()).hexdigest()[:40],
        size=int(length),
        sha256=None,
    )


def _look_up_one(repository: str, file: str, revision: str) -> RemoteFile:
    from huggingface_hub import get_hf_file_metadata

    if is_address(repository):
        return _look_up_address(repository, file)
    with _errors_as_phrases():
        found = get_hf_file_metadata(_url(repository, file, revision))
    commit, etag = found.commit_hash or "", found.etag or ""
    if not _COMMIT.fullmatch(commit):
        raise HubError("an answer that does not come from a Hugging Face Hub")
    if _COMMIT.fullmatch(revision) and commit != revision:
        raise HubError(f"commit {commit[:12]} for the pinned {revision[:12]}")
    return RemoteFile(
        repository=repository,
        file=file,
        commit=commit,
        size=found.size,
        sha256=etag if _SHA256.fullmatch(etag) else None,
    )


class _Counted:
    """A file that tells how long it is, and takes no more than it may hold.

    Errors of the disk keep apart from those of the network.
    """

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
        try:
            count = self._stream.write(data)
            self._stream.flush()
        except OSError as exc:
            raise FetchError(
                f"{self._path.parent}: cannot be written: {exc.strerror or exc}. Free space there, "
                "or set ZSSEG_HOME to another folder, and run it again: what came so far is kept."
            ) from exc
        self._on_bytes(self._stream.tell())
        return count


def _open_partial(partial: Path) -> IO[bytes]:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        return partial.open("ab")
    except OSError as exc:
        raise FetchError(
            f"{partial.parent}: cannot be written: {exc.strerror or exc}. Set ZSSEG_HOME to a "
            "folder that you can write to."
        ) from exc


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


def _refusal(error: Any) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 404:
        return HubError("HTTP 404, there is no such file", absent=True)
    if status in (401, 403):
        return HubError(
            f"HTTP {status}, the hub does not let you have it; if it needs a login, set HF_TOKEN"
        )
    if status is not None and status >= 500:
        return HubError(f"HTTP {status}, the hub is in trouble; try again later")
    return HubError(f"HTTP {status}" if status else f"no connection ({type(error).__name__})")


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the hub's library from printing warnings, signed addresses and a bar of its own."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    had_bars = not are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if had_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            enable_progress_bars()
