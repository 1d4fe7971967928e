"""A small stand-in of Triton's ``triton_python_backend_utils``, and what Triton calls a model with.

The real module is built into the process that Triton starts; ``test_triton_server.py`` uses that.
"""

from __future__ import annotations

import importlib.util
import json
import re
import types
from pathlib import Path

import numpy as np


class Tensor:
    def __init__(self, name, array):
        assert isinstance(array, np.ndarray)
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG = 2, 4

    def __init__(self, message, code=INTERNAL):
        assert isinstance(message, str)
        self._message, self._code = message, code

    def message(self):
        return self._message

    def code(self):
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class InferenceRequest:
    def __init__(self, inputs):
        self._inputs = inputs

    def inputs(self):
        return self._inputs


def get_input_tensor_by_name(request, name):
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def backend_utils() -> types.ModuleType:
    """The stand-in of the module."""
    module = types.ModuleType("triton_python_backend_utils")
    for member in (
        Tensor,
        TritonError,
        InferenceResponse,
        InferenceRequest,
        get_input_tensor_by_name,
    ):
        setattr(module, member.__name__, member)
    return module


def request(frame: np.ndarray, class_names: list[str] | None = None) -> InferenceRequest:
    """A client's request; texts arrive as bytes."""
    inputs = [Tensor("frame", frame)]
    if class_names is not None:
        texts = np.array([name.encode() for name in class_names], np.object_)
        inputs.append(Tensor("class_names", texts))
    return InferenceRequest(inputs)


def arguments(folder: Path, kind: str = "CPU", device_id: str = "0") -> dict[str, str]:
    """What Triton says to a model: all strings, ``config.pbtxt`` as JSON."""
    return {
        "model_config": json.dumps(read_config(folder / "config.pbtxt")),
        "model_instance_kind": kind,
        "model_instance_device_id": device_id,
        "model_repository": str(folder),
        "model_version": "1",
    }


def read_config(path: Path) -> dict:
    """The parts of a ``config.pbtxt`` that a model looks at, as Triton's JSON has them."""
    text = path.read_text(encoding="utf-8")
    parameters = re.findall(
        r'^parameters \{ key: "(\w+)"  value \{ string_value: ("(?:[^"\\]|\\.)*") \} \}$',
        text,
        re.MULTILINE,
    )
    outputs = re.findall(
        r'name: "(\w+)"  data_type: (\w+)',
        text[text.index("\noutput [") : text.index("\ninstance_")],
    )
    return {
        # The escapes that are written, of quotes and backslashes, mean the same in JSON.
        "parameters": {key: {"string_value": json.loads(value)} for key, value in parameters},
        "output": [{"name": name, "data_type": kind} for name, kind in outputs],
    }


def load_model(folder: Path):
    """Triton's model class out of a written ``model.py``."""
    spec = importlib.util.spec_from_file_location("triton_model_under_test", folder / "1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()
