"""Write bundles whole or not at all: into a folder beside the target, checked, then renamed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundle import FORMAT_VERSION, MANIFEST, Bundle, FileEntry, TextBankEntry
from zsseg_rt.errors import BundleError, VocabularyError
from zsseg_rt.export.verify import verify_bundle

__all__ = ["TextBank", "bundle_name", "new_bundle_folder", "write_manifest"]
__all__ += ["write_arrays", "write_golden", "write_text_bank"]

TextBank = tuple[Sequence[str], npt.NDArray[np.floating[Any]]]
SUFFIX = ".zsseg"


def bundle_name(path: Path) -> str:
    """The name a bundle takes from its folder.

    Raises:
        BundleError: The folder is not called ``NAME.zsseg``.
    """
    if path.suffix != SUFFIX or not path.stem:
        raise BundleError(f"path: expected NAME{SUFFIX}, got {path.name!r}. Add the ending.")
    return path.stem


@contextmanager
def new_bundle_folder(path: Path, *, overwrite: bool, verify: bool) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that becomes ``path`` if nothing fails.

    Args:
        path: Bundle folder to make.
        overwrite: Whether an existing bundle is replaced.
        verify: Whether the finished bundle is compared with its golden sample first.

    Raises:
        BundleError: ``path`` exists and may not be replaced, cannot be written, or the bundle
            disagrees with its golden sample.
    """
    bundle_name(path)
    _refuse_existing(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as exc:
        raise BundleError(f"{path}: cannot be written: {exc}. Choose another place.") from exc
    try:
        yield folder
        if verify:
            verify_bundle(folder).require(path.name)
        folder.chmod(0o755)  # mkdtemp makes it private
        _rename(folder, path)
    except OSError as exc:
        raise BundleError(f"{path}: cannot be written: {exc}. Free space or permissions?") from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path, **fields: Any) -> None:
    """Write ``bundle.json``; ``fields`` are :class:`Bundle`'s, without path and version."""
    bundle = Bundle(path=folder, format_version=FORMAT_VERSION, **fields)
    content = json.dumps(bundle.to_manifest(), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(content + "\n", encoding="utf-8")


def write_golden(folder: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> FileEntry:
    """Write ``golden.npz``: plain arrays only, no pickles."""
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise BundleError(f"golden: {name}: expected a plain array, got dtype {array.dtype}")
    path = folder / "golden.npz"
    np.savez_compressed(path, **dict(arrays))  # type: ignore[arg-type]
    return FileEntry.describe(path, folder)


def write_arrays(folder: Path, file: str, arrays: Mapping[str, npt.NDArray[Any]]) -> FileEntry:
    """Write a safetensors file of C-contiguous arrays."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / file)
    (folder / file).chmod(0o644)  # safetensors writes for the owner only
    return FileEntry.describe(folder / file, folder)


def write_text_bank(folder: Path, bank: TextBank | None, embed_dim: int) -> TextBankEntry | None:
    """Write precomputed class embeddings; None writes nothing.

    Raises:
        VocabularyError: Names and rows do not fit each other or the text space.
    """
    if bank is None:
        return None
    names, embeds = tuple(bank[0]), np.asarray(bank[1], np.float32)
    rows = embeds[0] if embeds.ndim == 3 and len(embeds) == 2 else embeds
    if rows.shape != (len(names), embed_dim) or not names:
        raise VocabularyError(
            f"text_bank: expected one row of {embed_dim} values for each of {len(names)} names, "
            f"got shape {embeds.shape}. Give (names, float [C, {embed_dim}]), or [2, C, "
            f"{embed_dim}] for segments and regions."
        )
    repeated = {name for name in names if names.count(name) > 1}
    if repeated or not all(name.strip() for name in names):
        raise VocabularyError(
            f"text_bank: expected distinct names, got {sorted(repeated) or 'an empty one'}. "
            "Name every row once."
        )
    if not np.isfinite(embeds).all():
        raise VocabularyError("text_bank: expected finite embeddings, got NaN or infinity")
    tensors = {"embeds": rows} if rows is embeds else {"embeds": rows, "region_embeds": embeds[1]}
    entry = write_arrays(folder, "text_bank.safetensors", tensors)
    return TextBankEntry(file=entry.file, sha256=entry.sha256, bytes=entry.bytes, names=names)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise BundleError(f"{path}: expected no such folder, found one. Pass overwrite=True.")
    if not (path / MANIFEST).is_file():
        raise BundleError(
            f"{path}: expected a bundle to replace, found something else. Remove it by hand."
        )


def _rename(folder: Path, path: Path) -> None:
    """Put ``folder`` at ``path``; an old bundle there is kept until the new one is in place."""
    if not path.exists():
        folder.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        moved = path.rename(old / path.name)
        try:
            folder.rename(path)
        except OSError:
            moved.rename(path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
