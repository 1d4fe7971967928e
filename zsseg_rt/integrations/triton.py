"""Write a bundle as a model of Triton Inference Server: a folder of its model repository."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zsseg_rt.bundles.bundle import MANIFEST, Bundle
from zsseg_rt.common.files.whole_folder import new_folder, remove_leftovers
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.integrations.triton_model import BUNDLE_FOLDER
from zsseg_rt.text.class_names import ClassList, ClassNames

__all__ = ["write_triton_model"]

_VERSION, _CONFIG_FILE = "1", "config.pbtxt"
_MODEL = '''"""The model that Triton runs; its code is in zsseg_rt, which the server needs."""

from zsseg_rt.integrations.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_CONFIG = """\
# Requests name their classes; those that do not get the ones in "class_names" below, if any.
name: {name}
backend: "python"
max_batch_size: 0
input [
  {{ name: "frame"  data_type: TYPE_UINT8  dims: [ -1, -1, 3 ] }},  # RGB [H, W, 3]
  # One text per class; commas separate synonyms.
  {{ name: "class_names"  data_type: TYPE_STRING  dims: [ -1 ]  optional: true }}
]
output [
  # The largest value is unknown. TYPE_UINT16 holds more than 254 classes.
  {{ name: "labels"  data_type: TYPE_UINT8  dims: [ -1, -1 ] }},
  {{ name: "names"  data_type: TYPE_STRING  dims: [ -1 ] }}
]
# A GPU if Triton finds one, else the CPU; KIND_CPU and KIND_GPU say which.
instance_group [ {{ count: 1  kind: KIND_AUTO }} ]
# JSON: settings of zsseg_rt.EngineConfig.
parameters {{ key: "engine"  value {{ string_value: {engine} }} }}
# JSON: a list of names, or of lists of synonyms.
parameters {{ key: "class_names"  value {{ string_value: {class_names} }} }}
"""


def write_triton_model(
    bundle: str | Path | Bundle,
    repository: Path,
    *,
    name: str | None = None,
    classes: ClassNames = (),
    engine: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``repository/NAME`` with ``config.pbtxt``, ``1/model.py`` and a copy of the bundle.

    The folder appears whole or not at all. The server that loads it needs this package.

    Args:
        bundle: The bundle to serve; every file is hashed first.
        repository: Triton's model repository; made if absent.
        name: The model's, of letters, digits and ``_.-``; None takes the bundle's, with ``_`` for
            every other character.
        classes: What requests that name no classes get; none leaves no default.
        engine: Settings of :class:`EngineConfig` other than the device, which is the instance's.
        overwrite: Whether a model that exists is replaced.

    Returns:
        The model's folder.

    Raises:
        ArgumentError: The name has other characters.
        BundleError: The bundle is incomplete or altered.
        ConfigError: A setting does not exist or has a bad value.
        SourceError: The model, or another folder of its name, exists; or it cannot be written.
        VocabularyError: A class name is unusable.
    """
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    loaded.verify()
    path = repository / _model_name(name, loaded)
    config = _config(path.name, classes, engine or {}, loaded)
    try:
        remove_leftovers(path)
        _refuse_existing(path, overwrite)
        with new_folder(path, replace=overwrite) as folder:
            (folder / _CONFIG_FILE).write_text(config, encoding="utf-8")
            _copy(loaded, folder / _VERSION / BUNDLE_FOLDER)
            (folder / _VERSION / "model.py").write_text(_MODEL, encoding="utf-8")
    except OSError as exc:
        raise SourceError(f"{path}: cannot be written: {exc}. Free space or permissions?") from exc
    return path


def _model_name(name: str | None, bundle: Bundle) -> str:
    chosen = re.sub(r"[^\w.-]", "_", bundle.name, flags=re.ASCII) if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", chosen, re.ASCII):
        raise ArgumentError(
            f"name: expected letters, digits and _.- after the first, got {chosen!r}. "
            "Choose another name."
        )
    return chosen


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise SourceError(
            f"{path}: expected a new folder, found an existing one. Name another, or replace it "
            "(overwrite=True, or --overwrite on the command line)."
        )
    if not (path / _CONFIG_FILE).is_file():
        raise SourceError(
            f"{path}: expected a model to replace, found something else. Remove it by hand."
        )


def _config(name: str, classes: ClassNames, engine: Mapping[str, Any], bundle: Bundle) -> str:
    EngineConfig.from_dict(engine)
    plain = [entry if isinstance(entry, str) else list(entry) for entry in classes]
    if plain:
        ClassList.read(plain, max_phrases=bundle.head.max_classes)
    return _CONFIG.format(
        name=_quoted(name), engine=_quoted(json.dumps(dict(engine))),
        class_names=_quoted(json.dumps(plain)),
    )  # fmt: skip


def _quoted(text: str) -> str:
    """ASCII text as a string of a protocol buffer's text format."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _copy(bundle: Bundle, target: Path) -> None:
    names: Sequence[str] = [MANIFEST, *(entry.file for entry in bundle.files())]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, target / name)
