"""Read the tensors of TorchScript archives, such as OpenAI's CLIP files, without running code.

``torch.jit.load`` runs methods from the archive, and these can write files.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zsseg_rt.torch_files.archive import Archive
from zsseg_rt.torch_files.inert_pickle import Instance, Machine, StoredTensor

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


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read what ``torch.jit.load(path).state_dict()`` returns.

    Returns:
        Parameters and buffers by key.
    """
    with Archive.open(path) as archive:
        modules = _module_classes(archive)
        stored = _named_tensors(archive.unpickle(Machine(stand_ins=True)), modules)
        return {key: archive.tensors.make(tensor) for key, tensor in stored.items()}


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


def _named_tensors(root: Any, classes: Mapping[str, _Names]) -> Mapping[str, StoredTensor]:
    """The tensors of a module and of its submodules."""
    if not _is_module(root, classes):
        raise ValueError(f"a {type(root).__name__} instead of a module")
    found: dict[str, StoredTensor] = {}
    waiting, left = [("", root)], _MAX_ATTRIBUTES
    while waiting:
        prefix, module = waiting.pop()
        names, attributes = classes[module.class_name], _attributes_of(module)
        left -= 1 + len(attributes)
        for name, value in attributes.items():
            key = f"{prefix}{name}" if isinstance(name, str) else ""
            if left < 0 or not 0 < len(key) <= _MAX_KEY:
                raise ValueError("modules that contain each other without end")
            if isinstance(value, StoredTensor) and (names is None or name in names):
                found[key] = value
            elif _is_module(value, classes):
                waiting.append((f"{key}.", value))
    if not found:
        raise ValueError("modules without a tensor")
    return found


def _is_module(value: Any, classes: Mapping[str, _Names]) -> bool:
    return isinstance(value, Instance) and value.class_name in classes


def _attributes_of(module: Instance) -> Mapping[Any, Any]:
    if module.attributes is None:
        raise ValueError(
            f"{module.class_name[:80]}, which restores its state by code of its own, which is "
            "never run"
        )
    return module.attributes
