"""The model that Triton's Python backend runs: an engine, classes named by each request."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.schema import parse_json
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import BackendUnavailableError, ConfigError, VocabularyError, ZssegError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.text.class_names import split_synonyms
from zsseg_rt.text.vocabulary import Vocabulary

BUNDLE_FOLDER = "bundle.zsseg"
"""Where a version of the model holds its bundle."""

_LABEL_TYPES: dict[str, type[np.uint8 | np.uint16]] = {
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT16": np.uint16,
}
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
        model_config = json.loads(args["model_config"])
        parameters = {
            key: value["string_value"] for key, value in model_config["parameters"].items()
        }
        self._label_type = _label_type(model_config)
        bundle = Path(args["model_repository"], args["model_version"], BUNDLE_FOLDER)
        self._engine = Engine(bundle, _engine_config(parameters.get("engine", "{}"), args))
        self._vocabularies: OrderedDict[tuple[str, ...], Vocabulary] = OrderedDict()
        classes = _parse("class_names", parameters.get("class_names", "[]"))
        self._default = self._engine.set_classes(classes) if classes else None
        self._check_count(self._default)

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
            seg = self._segment(frame, None if names is None else names.as_numpy())
        except ZssegError as exc:
            kind = "INVALID_ARG" if isinstance(exc, (TypeError, ValueError)) else "INTERNAL"
            error = pb_utils.TritonError(str(exc), getattr(pb_utils.TritonError, kind))
            return pb_utils.InferenceResponse(error=error)
        labels = _widened(seg, self._label_type)
        texts = np.array([name.encode() for name in seg.names], np.object_)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("labels", labels), pb_utils.Tensor("names", texts)]
        )

    def _segment(
        self, frame: npt.NDArray[np.uint8], names: npt.NDArray[np.object_] | None
    ) -> Segmentation:
        vocabulary = self._default if names is None else self._vocabulary(_texts(names))
        if vocabulary is None:
            raise VocabularyError(
                "class_names: expected names, got none, and config.pbtxt has no default. "
                "Send class_names, or export with --classes."
            )
        self._check_count(vocabulary)
        current = self._engine.vocabulary
        # A vocabulary that is named again gets a new version, but keeps its embeddings.
        if current is None or current.embeds is not vocabulary.embeds:
            self._engine.set_classes(vocabulary)
        return self._engine.segment(frame)

    def _check_count(self, vocabulary: Vocabulary | None) -> None:
        most = np.iinfo(self._label_type).max - 1
        if vocabulary is not None and len(vocabulary.names) > most:
            raise VocabularyError(
                f"class_names: expected at most {most} classes, got {len(vocabulary.names)}. "
                "Name fewer, or make labels TYPE_UINT16 in config.pbtxt."
            )

    def _vocabulary(self, names: tuple[str, ...]) -> Vocabulary:
        """The classes of these names; those of recent requests are kept."""
        found = self._vocabularies.get(names)
        if found is None:
            found = self._engine.set_classes(split_synonyms(names))
        self._vocabularies[names] = found
        self._vocabularies.move_to_end(names)
        if len(self._vocabularies) > _MOST_VOCABULARIES:
            self._vocabularies.popitem(last=False)
        return found


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


def _label_type(model_config: Mapping[str, Any]) -> type[np.uint8 | np.uint16]:
    """The type of ``labels`` in ``config.pbtxt``."""
    (kind,) = [out["data_type"] for out in model_config["output"] if out["name"] == "labels"]
    if kind not in _LABEL_TYPES:
        raise ConfigError(
            f"labels: expected data_type {' or '.join(_LABEL_TYPES)}, got {kind}. "
            "Change config.pbtxt."
        )
    return _LABEL_TYPES[kind]


def _engine_config(settings: str, args: Mapping[str, str]) -> EngineConfig:
    """The settings in ``config.pbtxt``; the device is that of the instance unless they name one."""
    config = EngineConfig.from_dict(_parse("engine", settings))
    if config.device != "auto":
        return config
    on_gpu = args["model_instance_kind"] == "GPU"
    return replace(config, device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")


def _parse(name: str, text: str) -> Any:
    try:
        return parse_json(text.encode())
    except (ValueError, RecursionError) as exc:
        raise ConfigError(
            f"{name}: expected JSON as the parameter's string_value, got {text!r}. "
            "Change config.pbtxt."
        ) from exc


def _texts(names: npt.NDArray[np.object_]) -> tuple[str, ...]:
    try:
        return tuple(name.decode() for name in names.reshape(-1))
    except UnicodeDecodeError as exc:
        raise VocabularyError(f"class_names: expected UTF-8, got {exc.object!r}.") from exc


def _widened(seg: Segmentation, wanted: type[np.uint8 | np.uint16]) -> npt.NDArray[Any]:
    """Labels in another type, where unknown is that type's largest value."""
    if seg.labels.dtype == wanted:
        return seg.labels
    labels = seg.labels.astype(wanted)
    labels[seg.labels == seg.unknown] = np.iinfo(wanted).max
    return labels
