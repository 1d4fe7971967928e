"""The model that Triton's Python backend runs: an engine, classes named by each request."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.common.schema import parse_json
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import BackendUnavailableError, ConfigError, VocabularyError, ZssegError
from zsseg_rt.text.class_names import split_synonyms

_OLD_NUMPY = "numpy.core.multiarray"
_MOST_VOCABULARIES = 16  # of 1024 phrases at most, as a rule 2 MB each


class TritonPythonModel:
    """Labels one frame per request; Triton makes one of these in each instance's process.

    Inputs are ``frame``, uint8 [H, W, 3] in RGB, and ``class_names``, an optional list of texts
    [C], each a class, with commas between synonyms. A request without names gets the classes in
    ``config.pbtxt``; a request's names hold for that request only. Outputs are ``labels``, [H, W]
    in the type that ``config.pbtxt`` says, whose largest value is unknown, and ``names``, [C].
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle; Triton calls this once."""
        _refuse_numpy_2()
        given = json.loads(args["model_config"])
        kinds = {output["name"]: output["data_type"] for output in given["output"]}
        if kinds["labels"] not in ("TYPE_UINT8", "TYPE_UINT16"):
            raise ConfigError(
                f"labels: expected data_type TYPE_UINT8 or TYPE_UINT16, got {kinds['labels']}. "
                "Change config.pbtxt."
            )
        self._labels = np.dtype(kinds["labels"].removeprefix("TYPE_").lower())
        config = EngineConfig.from_dict(_parameter(given, "engine", "{}"))
        if config.device == "auto":  # that of the instance
            gpu = f"cuda:{args['model_instance_device_id']}"
            config = replace(config, device=gpu if args["model_instance_kind"] == "GPU" else "cpu")
        folder = Path(args["model_repository"], args["model_version"])
        self._engine = Engine(folder / "bundle.zsseg", config)
        self._named = lru_cache(_MOST_VOCABULARIES)(
            lambda names: self._engine.set_classes(split_synonyms(names))
        )
        classes = _parameter(given, "class_names", "[]")
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
    """Refuse NumPy 2 in a Triton whose pybind11 is too old for it: it would crash on texts.

    Such a pybind11 looks for ``numpy.core`` when the first array reaches it; newer ones know that
    NumPy 2 calls it ``numpy._core``.
    """
    import triton_python_backend_utils as pb_utils

    if int(np.__version__.partition(".")[0]) < 2:
        return
    sys.modules.pop(_OLD_NUMPY, None)
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
