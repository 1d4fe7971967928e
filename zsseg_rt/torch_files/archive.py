"""Read files of ``torch.save`` without running any code that they hold, and without torch.

Sizes that a file claims are checked against the file before memory is allocated for them.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zsseg_rt.torch_files.inert_pickle import Machine, StoredTensor
from zsseg_rt.torch_files.shapes import Array

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # of torch.save before version 1.6
_FORMAT_VERSION = 1001
# Views can share bytes: all tensors together take at most this many times the file's size.
_MAX_EXPANSION, _ALWAYS_ALLOWED = 4, 1 << 24


class TensorReader:
    """Makes arrays from the storages of a file; those of one storage share its memory."""

    def __init__(self, read: Callable[[str], bytearray], file_size: int) -> None:
        self._read = read
        self._storages: dict[str, bytearray] = {}
        self._left = max(_MAX_EXPANSION * file_size, _ALWAYS_ALLOWED)

    def make(self, stored: StoredTensor) -> Array:
        """Read a tensor; bfloat16, which NumPy lacks, as the uint16 of its bits."""
        dtype, shape = element_type(stored.dtype), stored.shape
        self._left -= math.prod(shape) * dtype.itemsize
        if self._left < 0:
            raise ValueError("tensors that are much larger than the file")
        if stored.key not in self._storages:
            self._storages[stored.key] = self._read(stored.key)
        storage = self._storages[stored.key]
        reach = sum((n - 1) * stride for n, stride in zip(shape, stored.strides, strict=True))
        if not math.prod(shape):
            return np.empty(shape, dtype)
        if stored.offset + reach >= len(storage) // dtype.itemsize:
            raise ValueError(f"a tensor of shape {list(shape)} beyond its storage")
        steps = tuple(stride * dtype.itemsize for stride in stored.strides)
        return np.ndarray(shape, dtype, storage, stored.offset * dtype.itemsize, steps)


def element_type(name: str) -> np.dtype[Any]:
    """The type of a stored tensor's elements; that of its bits for bfloat16."""
    return np.dtype("uint16" if name == "bfloat16" else name)


class Archive:
    """A ZIP file of torch; its entries are in one folder, and tensors are uncompressed.

    Attributes:
        folder: Name of the folder.
        tensors: Makes the file's tensors.
    """

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self.file = file
        self.folder = file.namelist()[0].split("/")[0]
        self._left = size
        self.tensors = TensorReader(lambda key: self._read(f"data/{key}"), size)
        if f"{self.folder}/byteorder" in file.namelist():
            _check_byte_order(self._read("byteorder").decode())

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Archive]:
        """Open a file; for the errors it raises see :func:`open_torch_file`."""
        with zipfile.ZipFile(path) as file:
            yield cls(file, path.stat().st_size)

    def unpickle(self) -> Any:
        """The content of the archive, with tensors as :class:`StoredTensor`."""
        return Machine().run(io.BytesIO(self._read("data.pkl")))

    def _read(self, name: str) -> bytearray:
        entry = self.file.getinfo(f"{self.folder}/{name}")
        self._left -= entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or self._left < 0:
            raise zipfile.BadZipFile(
                f"{entry.filename[:80]}, {entry.file_size} bytes, is compressed or larger than the "
                "file"
            )
        content = bytearray(self.file.read(entry))
        if len(content) != entry.file_size:
            raise zipfile.BadZipFile(f"{entry.filename[:80]} is cut short")
        return content


@contextmanager
def open_torch_file(path: Path) -> Iterator[tuple[Any, TensorReader]]:
    """Read the content of a file, with tensors as :class:`StoredTensor`.

    Yields:
        The content, and the object that makes its tensors.
    """
    if zipfile.is_zipfile(path):
        with Archive.open(path) as archive:
            yield archive.unpickle(), archive.tensors
    else:
        machine, size = Machine(), path.stat().st_size
        with path.open("rb") as stream:
            content = _read_old_header(machine, stream)
            places = _storage_places(machine, stream, size)
            yield content, TensorReader(lambda key: _read_at(stream, *places[key]), size)


def _check_byte_order(order: str) -> None:
    if order != sys.byteorder:
        raise ValueError(f"{order[:20]}-endian numbers on a {sys.byteorder}-endian machine")


def _read_old_header(machine: Machine, stream: BinaryIO) -> Any:
    """The content of a file of ``torch.save`` before version 1.6."""
    if machine.run(stream) != _MAGIC_NUMBER or machine.run(stream) != _FORMAT_VERSION:
        raise pickle.UnpicklingError("not a file of torch.save")
    _check_byte_order("little" if machine.run(stream)["little_endian"] else "big")
    return machine.run(stream)


def _storage_places(machine: Machine, stream: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """Start and size in bytes of every storage in such a file."""
    places = {}
    for key in machine.run(stream):
        count = int.from_bytes(stream.read(8), sys.byteorder)
        begin, num_bytes = stream.tell(), count * element_type(machine.storages[key]).itemsize
        if begin + num_bytes > size:
            raise EOFError(f"storage {key[:40]!r} ends past the end of the file")
        places[key] = (begin, num_bytes)
        stream.seek(begin + num_bytes)
    return places


def _read_at(stream: BinaryIO, begin: int, num_bytes: int) -> bytearray:
    stream.seek(begin)
    return bytearray(stream.read(num_bytes))
