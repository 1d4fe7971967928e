"""A small stand-in of Triton's ``triton_python_backend_utils``, and what Triton calls a model with.

The real module is built into the process that Triton starts; ``test_triton_server.py`` uses that.
"""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np


class Tensor:
    def __init__(self, name, array):
        assert isinstance(array, np.ndarray)
        assert array.flags.c_contiguous
        self.name, self.as_numpy = lambda: name, lambda: array


class TritonError:
    INTERNAL, INVALID_ARG = 2, 4

    def __init__(self, message, code=INTERNAL):
        assert isinstance(message, str)
        self.message, self.code = lambda: message, lambda: code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.output_tensors, self.error = lambda: list(output_tensors), lambda: error
        self.has_error = lambda: error is not None


def get_input_tensor_by_name(request, name):
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def backend_utils() -> SimpleNamespace:
    members = (Tensor, TritonError, InferenceResponse, get_input_tensor_by_name)
    return SimpleNamespace(**{member.__name__: member for member in members})


def request(frame: np.ndarray, class_names: list[str] | None = None) -> SimpleNamespace:
    """A client's request; texts arrive as bytes."""
    inputs = [Tensor("frame", frame)]
    if class_names is not None:
        texts = np.array([name.encode() for name in class_names], np.object_)
        inputs.append(Tensor("class_names", texts))
    return SimpleNamespace(inputs=lambda: inputs)


def arguments(folder: Path, kind: str = "CPU") -> dict[str, str]:
    """Triton's arguments to a model: all strings, ``config.pbtxt`` as JSON."""
    return {
        "model_config": json.dumps(read_config(folder / "config.pbtxt")),
        "model_instance_kind": kind,
        "model_instance_device_id": "0",
        "model_repository": str(folder),
        "model_version": "1",
    }


def read_config(path: Path) -> dict:
    """The parts of a ``config.pbtxt`` that a model looks at, as Triton's JSON has them."""
    text = path.read_text(encoding="utf-8")
    pattern = r'^parameters \{ key: "(\w+)"  value \{ string_value: ("(?:[^"\\]|\\.)*") \} \}$'
    parameters = re.findall(pattern, text, re.MULTILINE)
    outputs = text[text.index("\noutput [") : text.index("\ninstance_")]
    return {
        # The escapes that are written, of quotes and backslashes, mean the same in JSON.
        "parameters": {key: {"string_value": json.loads(value)} for key, value in parameters},
        "output": [
            {"name": name, "data_type": kind}
            for name, kind in re.findall(r'name: "(\w+)"  data_type: (\w+)', outputs)
        ],
    }


def load_model(folder: Path):
    """Triton's model class out of a written ``model.py``."""
    return runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
