"""A bundle as a Triton model: the files that are written, and what they do when Triton calls."""

import contextlib
import json
import re
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from support.command_line import run
from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.errors import (
    ArgumentError,
    BackendUnavailableError,
    BundleError,
    ConfigError,
    DeviceError,
    SourceError,
    VocabularyError,
)
from zsseg_rt.integrations.triton import write_triton_model

CPU = {"use_cache": False, "num_threads": 1}


class Tensor:
    def __init__(self, name, array):
        assert array.flags.c_contiguous
        self.name, self.as_numpy = lambda: name, lambda: array


class TritonError:
    INVALID_ARG = 4

    def __init__(self, message, code):
        self.message, self.code = lambda: message, lambda: code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.output_tensors, self.error = lambda: list(output_tensors), lambda: error


@pytest.fixture(autouse=True)
def backend_utils(monkeypatch):
    """Stands for the module that is built into Triton; ``test_triton_server.py`` uses that."""
    find = lambda asked, name: next((one for one in asked.inputs() if one.name() == name), None)  # noqa: E731
    module = SimpleNamespace(
        Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=find,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


def request(frame, class_names=None):
    """A client's request; texts arrive as bytes."""
    inputs = [Tensor("frame", frame)]
    if class_names is not None:
        texts = np.array([name.encode() for name in class_names], np.object_)
        inputs.append(Tensor("class_names", texts))
    return SimpleNamespace(inputs=lambda: inputs)


def read_config(folder):
    """The parts of a ``config.pbtxt`` that a model looks at, as Triton's JSON has them."""
    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    pattern = r'^parameters \{ key: "(\w+)"  value \{ string_value: ("(?:[^"\\]|\\.)*") \} \}$'
    outputs = text[text.index("\noutput [") : text.index("\ninstance_")]
    return {
        # The escapes that are written, of quotes and backslashes, mean the same in JSON.
        "parameters": {key: {"string_value": json.loads(value)}
                       for key, value in re.findall(pattern, text, re.MULTILINE)},
        "output": [{"name": name, "data_type": kind}
                   for name, kind in re.findall(r'name: "(\w+)"  data_type: (\w+)', outputs)],
    }  # fmt: skip


@pytest.fixture
def started(colour_bundle, tmp_path):
    with contextlib.ExitStack() as opened:

        def start(edit=lambda text: text, kind="CPU", **settings):
            settings = {"engine": CPU} | settings
            folder = write_triton_model(colour_bundle, tmp_path / "repository", **settings)
            config = folder / "config.pbtxt"
            config.write_text(edit(config.read_text()))
            model = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
            arguments = {
                "model_config": json.dumps(read_config(folder)), "model_instance_kind": kind,
                "model_instance_device_id": "0", "model_repository": str(folder),
                "model_version": "1",
            }  # fmt: skip
            model.initialize(arguments)
            opened.callback(model.finalize)
            return model

        yield start


@pytest.fixture
def frame():
    blocks = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return np.ascontiguousarray(blocks.repeat(9, axis=0).repeat(11, axis=1))


def answer(model, frame, class_names=None):
    (response,) = model.execute([request(frame, class_names)])
    outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
    assert outputs.keys() == {"labels", "names"}
    return outputs["labels"], [name.decode() for name in outputs["names"]]


def test_the_folder_is_whole(colour_bundle, tmp_path):
    folder = write_triton_model(colour_bundle, tmp_path / "new" / "repository", name="colours-1.b")
    assert folder == tmp_path / "new" / "repository" / "colours-1.b"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    bundle = Bundle.load(colour_bundle)
    own = {f"1/bundle.zsseg/{entry.file}" for entry in bundle.files()}
    assert files == own | {"config.pbtxt", "1/model.py", "1/bundle.zsseg/bundle.json"}
    copy = folder / "1" / "bundle.zsseg"
    Bundle.load(copy).verify()
    (graph,) = copy.glob("image_encoder*.onnx")
    content = graph.read_bytes()
    graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with refused(BundleError, None, "sha256"):
        write_triton_model(copy, tmp_path / "again")


@pytest.mark.parametrize(
    ("settings", "error", "argument"),
    [
        *(({"name": name}, ArgumentError, "name") for name in ("", "a b", "a/b", "..", "é", "-a")),
        ({"engine": {"precisoin": "float32"}}, ConfigError, "EngineConfig"),
        ({"classes": ["red", "red"]}, VocabularyError, "class_names"),
        ({"repository": "file"}, SourceError, None),
    ],
)
def test_nothing_wrong_is_written(colour_bundle, tmp_path, settings, error, argument):
    (tmp_path / "file").touch()
    settings = settings | {"repository": tmp_path / settings.get("repository", "")}
    with refused(error, argument, *([] if argument else ["colours"])):
        write_triton_model(colour_bundle, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_is_replaced_only_on_request(colour_bundle, tmp_path):
    folder = write_triton_model(colour_bundle, tmp_path)
    (folder / "old").touch()
    with refused(SourceError, None, "colours"):
        write_triton_model(colour_bundle, tmp_path)
    assert write_triton_model(colour_bundle, tmp_path, overwrite=True) == folder
    assert not (folder / "old").exists()
    (folder / "config.pbtxt").unlink()
    with refused(SourceError, None, "colours"):
        write_triton_model(colour_bundle, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("kind", ["UINT8", "UINT16"])
def test_each_request_has_its_own_classes(started, colour_bundle, frame, kind):
    engine, dtype, expected = CPU | {"unknown_below": 0.6}, np.dtype(kind.lower()), []
    with Engine(colour_bundle, EngineConfig(device="cpu", **engine)) as plain:
        for names in (["red", "blue"], [["green", "white"], "red"]):
            plain.set_classes(names)
            labels = plain.segment(frame).labels
            assert 0 < (labels == 255).mean() < 1
            expected.append(np.where(labels == 255, dtype.type(np.iinfo(dtype).max), labels))
    typed = '"labels"  data_type: TYPE_'
    edit = lambda text: text.replace(f"{typed}UINT8", typed + kind)  # noqa: E731
    model = started(edit, classes=["red", "blue"], engine=engine)
    for asked, shown, labels in (
        (None, ["red", "blue"], expected[0]),
        (["green, white", "red"], ["green", "red"], expected[1]),
    ) * 2:
        result, names = answer(model, frame, asked)
        assert (names, result.dtype) == (shown, dtype)
        np.testing.assert_array_equal(result, labels)


def test_wrong_names_are_the_client_s_fault(started, frame):
    model, sound = started(), request(frame[::2].copy(), ["red"])
    for class_names, message in (
        (None, "class_names: expected names, got none, and config.pbtxt has no default"),
        ([], "class_names: expected at least one class"),
        ([" , "], "class_names: expected a name, got ' , '"),
        (["red", "red"], "class_names: expected every name once"),
        (["a\x00"], "class_names[0]: expected plain text"),
    ):
        wrong, other = model.execute([request(frame, class_names), sound])
        assert wrong.error().message().startswith(message)
        assert wrong.error().code() == TritonError.INVALID_ARG
        assert other.output_tensors()[0].as_numpy().shape == frame[::2].shape[:2]


@pytest.mark.parametrize(("old", "new", "argument"), [
    ('"labels"  data_type: TYPE_UINT8', '"labels"  data_type: TYPE_FP32', "labels"),
    ("use_cache", "EngineConfig", "EngineConfig"),
    ('string_value: "{', 'string_value: "', "engine"),
    ('string_value: "[', 'string_value: "', "class_names"),
])  # fmt: skip
def test_a_wrong_config_is_named(started, old, new, argument):
    with refused(ConfigError, argument):
        started(lambda text: text.replace(old, new), classes=["red"])


def test_a_gpu_instance_needs_that_gpu(started):
    with pytest.raises((DeviceError, BackendUnavailableError)):
        started(kind="GPU", engine=CPU | {"backend": "openvino"})


def test_an_old_triton_with_a_new_numpy_is_refused(started, backend_utils, monkeypatch):
    looks = "numpy.core.multiarray", np  # as an old pybind11 does at the first array
    backend_utils.Tensor = lambda *_: monkeypatch.setitem(sys.modules, *looks)
    monkeypatch.setattr(np, "__version__", "2.1.0")
    with refused(BackendUnavailableError, "numpy"):
        started()


def test_export_writes_a_model(colour_bundle, tmp_path, capsys):
    options = ("--classes", "red, blue", "--threads", 1, "--name", "street")
    assert run("export", colour_bundle, "--triton", tmp_path, *options) == 0
    assert f"wrote {tmp_path / 'street'}" in capsys.readouterr().out
    parameters = read_config(tmp_path / "street")["parameters"]
    assert parameters["class_names"]["string_value"] == '["red", "blue"]'
    assert '"num_threads": 1' in parameters["engine"]["string_value"]
    assert run("export", f"--triton={tmp_path}", colour_bundle) == 0
    assert run("export", "triton", colour_bundle, "--out", tmp_path / "more") == 0
    assert run("export", colour_bundle, "--triton", tmp_path) == 1
    assert "overwrite=True" in capsys.readouterr().err
    assert run("export", colour_bundle, "--triton", tmp_path, "--overwrite") == 0
