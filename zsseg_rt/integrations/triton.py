"""Write a bundle as a model of Triton Inference Server: a folder of its model repository."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsseg_rt.bundles.bundle import MANIFEST, Bundle
from zsseg_rt.common.files import remove_leftovers, whole_folder
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.text.class_names import ClassList, ClassNames

__all__ = ["write_triton_model"]

_MODEL = '''"""The model that Triton runs; its code is in zsseg_rt, which the server needs."""

from zsseg_rt.integrations.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_CONFIG = """\
name: {name}
backend: "python"
max_batch_size: 0
input [
  {{ name: "frame"  data_type: TYPE_UINT8  dims: [ -1, -1, 3 ] }},  # RGB [H, W, 3]
  # One text per class, commas between synonyms; without it, "class_names" below.
  {{ name: "class_names"  data_type: TYPE_STRING  dims: [ -1 ]  optional: true }}
]
output [
  # The largest value is unknown. TYPE_UINT16 holds more than 254 classes.
  {{ name: "labels"  data_type: TYPE_UINT8  dims: [ -1, -1 ] }},
  {{ name: "names"  data_type: TYPE_STRING  dims: [ -1 ] }}
]
instance_group [ {{ count: 1  kind: KIND_AUTO }} ]  # a GPU if Triton finds one
# JSON: settings of EngineConfig, and a list of names or of lists of synonyms.
parameters {{ key: "engine"  value {{ string_value: {engine} }} }}
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
    plain = re.sub(r"[^\w.-]", "_", loaded.name, flags=re.ASCII) if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", plain, re.ASCII):
        raise ArgumentError(
            f"name: expected letters, digits and _.- after the first, got {name!r}. Choose another."
        )
    EngineConfig.from_dict(engine or {})
    names = [entry if isinstance(entry, str) else list(entry) for entry in classes]
    if names:
        ClassList.read(names, max_phrases=loaded.head.max_classes)
    # JSON as a string of a protocol buffer's text format
    texts = {"name": plain, "engine": json.dumps(dict(engine or {}))}
    texts["class_names"] = json.dumps(names)
    path = repository / plain
    try:
        remove_leftovers(path)
        _refuse_existing(path, overwrite)
        with whole_folder(path, overwrite=overwrite) as folder:
            config = _CONFIG.format(**{key: json.dumps(text) for key, text in texts.items()})
            (folder / "config.pbtxt").write_text(config, encoding="utf-8")
            for file in [MANIFEST, *(entry.file for entry in loaded.files())]:
                target = folder / "1" / "bundle.zsseg" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(loaded.path / file, target)
            (folder / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
    except OSError as exc:
        raise SourceError(f"{path}: cannot be written: {exc}. Free space or permissions?") from exc
    return path


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise SourceError(
            f"{path}: expected a new folder, found an existing one. Name another, or replace it "
            "(overwrite=True, or --overwrite on the command line)."
        )
    if path.exists() and not (path / "config.pbtxt").is_file():
        raise SourceError(
            f"{path}: expected a model to replace, found something else. Remove it by hand."
        )
