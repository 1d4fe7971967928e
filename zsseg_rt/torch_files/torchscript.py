"""Read the tensors of TorchScript archives, such as OpenAI's CLIP files, without running code.

``torch.jit.load`` runs methods from the archive, and these can write files.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from zsseg_rt.torch_files.archive import Archive
from zsseg_rt.torch_files.inert_pickle import Instance, StoredTensor
from zsseg_rt.torch_files.shapes import Array

_MAX_CODE, _MAX_NAMES = 1 << 25, 1 << 16  # characters of source text, of a module's names
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MAX_ATTRIBUTES, _MAX_KEY = 100_000, 500  # of nested modules
# A module's class in an archive's source text. Before torch 1.6 it does not list buffers.
_MODULE = re.compile(
    r"^class (\w+)\(Module\):\n"
    r"  __parameters__ = \[(.*)\]\n"
    r"(?:  __buffers__ = \[(.*)\]\n)?",
    re.MULTILINE,
)
_Names = Collection[str] | None  # None: every tensor


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, tuple[Array, str]]:
    """Read what ``torch.jit.load(path).state_dict()`` returns.

    Returns:
        Parameters and buffers by key; see :func:`zsseg_rt.torch_files.weights.read_weights`.
    """
    with Archive.open(path) as archive:
        classes, root = _module_classes(archive), archive.unpickle()
        if not _is_module(root, classes):
            raise ValueError(f"a {type(root).__name__} instead of a module")
        stored = named_tensors(root, lambda module: _parts_of(module, classes))
        return {key: (archive.tensors.make(t), t.dtype) for key, t in stored.items()}


def _module_classes(archive: Archive) -> dict[str, _Names]:
    """Names of the parameters and buffers of every module class, read from the source text."""
    folder = f"{archive.folder}/code/"
    entries = [entry for entry in archive.file.infolist() if entry.filename.startswith(folder)]
    sources = [entry for entry in entries if entry.filename.endswith(".py")]
    if sum(entry.file_size for entry in sources) > _MAX_CODE:
        raise ValueError("more source text than a model has")
    if any(entry.compress_type not in _COMPRESSIONS for entry in sources):
        raise ValueError("source text that is compressed as torch never does")
    classes: dict[str, _Names] = {}
    for entry in sources:
        module = entry.filename.removeprefix(folder).removesuffix(".py").replace("/", ".")
        with archive.file.open(entry) as stream:
            text = stream.read(entry.file_size).decode()  # also limits the unpacked size
        for found in _MODULE.finditer(text):
            name, parameters, buffers = found.groups()
            if len(parameters) + len(buffers or "") > _MAX_NAMES:
                raise ValueError("a module of more names than a model has")
            listed = None if buffers is None else re.findall(r'"([^"]*)"', parameters + buffers)
            classes[f"{module}.{name}"] = listed
    return classes


def named_tensors(
    root: Instance, parts_of: Callable[[Instance], Mapping[Any, Any]]
) -> dict[str, StoredTensor]:
    """The tensors of a module and of its submodules, which ``parts_of`` gives by name."""
    found: dict[str, StoredTensor] = {}
    waiting, left = [("", root)], _MAX_ATTRIBUTES
    while waiting:
        prefix, module = waiting.pop()
        parts = parts_of(module)
        left -= 1 + len(parts)
        for name, value in parts.items():
            key = f"{prefix}{name}" if isinstance(name, str) else ""
            if left < 0 or not 0 < len(key) <= _MAX_KEY:
                raise ValueError("modules that contain each other without end")
            if isinstance(value, StoredTensor):
                found[key] = value
            elif isinstance(value, Instance):
                waiting.append((f"{key}.", value))
    if not found:
        raise ValueError("modules without a tensor")
    return found


def _parts_of(module: Instance, classes: Mapping[str, _Names]) -> Mapping[Any, Any]:
    """A module's parameters, buffers and submodules, among other attributes."""
    if module.attributes is None:
        raise ValueError(
            f"{module.class_name[:80]}, which restores its state by code of its own, which is "
            "never run"
        )
    names, parts = classes[module.class_name], {}
    for name, value in module.attributes.items():
        is_listed = names is None or name in names
        if _is_module(value, classes) or (isinstance(value, StoredTensor) and is_listed):
            parts[name] = value
        elif isinstance(value, Instance) and names is not None and is_listed:
            raise ValueError(f"{name}, a tensor made by {value.class_name[:80]}, which is not read")
    return parts


def _is_module(value: Any, classes: Mapping[str, _Names]) -> bool:
    return isinstance(value, Instance) and value.class_name in classes
