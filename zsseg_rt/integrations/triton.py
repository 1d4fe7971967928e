"""A bundle in Triton Inference Server: its folder in a repository, and the model that is run."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.bundles.bundle import MANIFEST, Bundle
from zsseg_rt.common.files import remove_leftovers, whole_folder
from zsseg_rt.common.schema import parse_json
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import (
    ArgumentError,
    BackendUnavailableError,
    ConfigError,
    SourceError,
    VocabularyError,
    ZssegError,
)
from zsseg_rt.text.class_names import ClassList, ClassNames, split_synonyms

__all__ = ["write_triton_model"]

_MODEL = '''"""The model that Triton runs; its code is in zsseg_rt, which the server needs."""

from zsseg_rt.integrations.triton import TritonPythonModel

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
_OLD_NUMPY = "numpy.core.multiarray"
_MOST_VOCABULARIES = 16  # of 1024 phrases at most, as a rule 2 MB each


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
    texts = (plain, json.dumps(dict(engine or {})), json.dumps(names))
    # A string of a protocol buffer's text format is written as JSON writes it.
    values = dict(zip(("name", "engine", "class_names"), map(json.dumps, texts), strict=True))
    path = repository / plain
    try:
        remove_leftovers(path)
        if path.exists() and not (overwrite and (path / "config.pbtxt").is_file()):
            raise SourceError(
                f"{path}: expected a new folder, or a model to replace (overwrite=True, or "
                "--overwrite on the command line), found something else. Name another."
            )
        with whole_folder(path, overwrite=overwrite) as folder:
            (folder / "config.pbtxt").write_text(_CONFIG.format(**values), encoding="utf-8")
            for file in [MANIFEST, *(entry.file for entry in loaded.files())]:
                target = folder / "1" / "bundle.zsseg" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(loaded.path / file, target)
            (folder / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
    except OSError as exc:
        raise SourceError(f"{path}: cannot be written: {exc}. Free space or permissions?") from exc
    return path


class TritonPythonModel:
    """Labels one frame per request; Triton makes one of these in each instance's process.

    Inputs are ``frame``, uint8 [H, W, 3] in RGB, and optional ``class_names`` [C], texts with
    commas between synonyms, for this request only. Outputs are ``labels`` [H, W] and ``names`` [C].
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle; Triton calls this once."""
        _refuse_numpy_2()
        model = json.loads(args["model_config"])
        kinds = {output["name"]: output["data_type"] for output in model["output"]}
        if kinds["labels"] not in ("TYPE_UINT8", "TYPE_UINT16"):
            raise ConfigError(
                f"labels: expected data_type TYPE_UINT8 or TYPE_UINT16, got {kinds['labels']}. "
                "Change config.pbtxt."
            )
        self._labels = np.dtype(kinds["labels"].removeprefix("TYPE_").lower())
        config = EngineConfig.from_dict(_parameter(model, "engine", "{}"))
        if config.device == "auto":  # that of the instance
            gpu = f"cuda:{args['model_instance_device_id']}"
            config = replace(config, device=gpu if args["model_instance_kind"] == "GPU" else "cpu")
        folder = Path(args["model_repository"], args["model_version"])
        self._engine = Engine(folder / "bundle.zsseg", config)
        self._named = lru_cache(_MOST_VOCABULARIES)(
            lambda names: self._engine.set_classes(split_synonyms(names))
        )
        classes = _parameter(model, "class_names", "[]")
        self._default = self._engine.set_classes(classes) if classes else None
        if self._default is not None:
            self._name_classes(None)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, each with labels or with what was wrong with it."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Free the engine; Triton calls this when it unloads the model."""
        self._engine.close()

    def _answer(self, request: Any) -> Any:
        import triton_python_backend_utils as pb_utils

        try:
            frame = pb_utils.get_input_tensor_by_name(request, "frame").as_numpy()
            names = pb_utils.get_input_tensor_by_name(request, "class_names")
            self._name_classes(None if names is None else names.as_numpy())
            seg = self._engine.segment(frame)
        except ZssegError as exc:
            kind = "INVALID_ARG" if isinstance(exc, (TypeError, ValueError)) else "INTERNAL"
            error = pb_utils.TritonError(str(exc), getattr(pb_utils.TritonError, kind))
            return pb_utils.InferenceResponse(error=error)
        labels = seg.labels.astype(self._labels)
        labels[seg.labels == seg.unknown] = np.iinfo(self._labels).max
        texts = np.array([name.encode() for name in seg.names], np.object_)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("labels", labels), pb_utils.Tensor("names", texts)]
        )

    def _name_classes(self, texts: Any) -> None:
        """Take a request's classes, or the default ones; recent sets keep their embeddings."""
        vocabulary = self._default
        if texts is not None:
            try:
                vocabulary = self._named(tuple(text.decode() for text in texts.reshape(-1)))
            except UnicodeDecodeError as exc:
                raise VocabularyError(f"class_names: expected UTF-8, got {exc.object!r}.") from exc
        if vocabulary is None:
            raise VocabularyError(
                "class_names: expected names, got none, and config.pbtxt has no default. "
                "Send class_names, or export with --classes."
            )
        most = np.iinfo(self._labels).max - 1
        if len(vocabulary.names) > most:
            raise VocabularyError(
                f"class_names: expected at most {most} classes, got {len(vocabulary.names)}. "
                "Name fewer, or make labels TYPE_UINT16 in config.pbtxt."
            )
        current = self._engine.vocabulary
        # A vocabulary that is named again gets a new version, but keeps its embeddings.
        if current is None or current.embeds is not vocabulary.embeds:
            self._engine.set_classes(vocabulary)


def _refuse_numpy_2() -> None:
    """Refuse NumPy 2 where Triton's pybind11 is too old for it: texts would crash the server."""
    import triton_python_backend_utils as pb_utils

    if int(np.__version__.partition(".")[0]) < 2:
        return
    sys.modules.pop(_OLD_NUMPY, None)  # such a pybind11 looks for it at the first array
    pb_utils.Tensor("probe", np.zeros(1, np.uint8))
    if _OLD_NUMPY in sys.modules:
        raise BackendUnavailableError(
            f"numpy: expected a version below 2, which this Triton needs, got {np.__version__}. "
            "Run: pip install 'numpy<2' in the server's Python, or use a newer Triton."
        )


def _parameter(model_config: Mapping[str, Any], name: str, default: str) -> Any:
    text = model_config["parameters"].get(name, {"string_value": default})["string_value"]
    try:
        return parse_json(text.encode())
    except (ValueError, RecursionError) as exc:
        raise ConfigError(
            f"{name}: expected JSON as the parameter's string_value, got {text!r}. "
            "Change config.pbtxt."
        ) from exc
