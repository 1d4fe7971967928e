"""Every TensorRT attribute the backend uses exists in every version it serves.

The real bindings are imported, each in a process of its own, against stub libraries: nothing of
TensorRT's runs.
"""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from support.command_line import python
from support.tensorrt_api_check import used_attributes

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "zsseg_rt" / "backends").glob("_tensorrt*.py"))

# all that the bindings import from TensorRT's libraries
STUB = """
#define STUB(name) void* name(void) { return 0; }
STUB(createInferBuilder_INTERNAL) STUB(createInferRefitter_INTERNAL)
STUB(createInferRuntime_INTERNAL) STUB(createNvOnnxParserRefitter_INTERNAL)
STUB(createNvOnnxParser_INTERNAL) STUB(getBuilderPluginRegistry) STUB(getNvOnnxParserVersion)
STUB(getPluginRegistry) STUB(initLibNvInferPlugins)
"""
LIBRARIES = [
    *(
        f"lib{name}.so.{major}"
        for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin")
        for major in (10, 11)
    ),
    "libtensorrt_rtx.so.1",
    "libtensorrt_onnxparser_rtx.so.1",
]


def load_fetcher():
    path = ROOT / "tools" / "machines" / "fetch_tensorrt_bindings.py"
    spec = importlib.util.spec_from_file_location("fetch_tensorrt_bindings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FETCHER = load_fetcher()


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler found for the stub libraries")
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub.c").write_text(STUB)
    for name in LIBRARIES:
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([compiler, *flags, str(folder / "stub.c")], check=True)
    return folder


@pytest.mark.parametrize("requirement", FETCHER.BINDINGS)
def test_bindings_have_all_that_the_backend_uses(requirement, stubs):
    target = FETCHER.FOLDER / requirement.replace("==", "-")
    if not target.is_dir():
        pytest.skip(
            f"no {requirement} for this Python: run {Path(FETCHER.__file__).relative_to(ROOT)}"
        )
    checker = ROOT / "python_tests" / "support" / "tensorrt_api_check.py"
    places = {"PYTHONPATH": str(target), "LD_LIBRARY_PATH": str(stubs)}
    done = python(checker, FETCHER.BINDINGS[requirement], *SOURCES, more_env=places)
    assert done.returncode == 0, done.stderr
    version, *lacking = done.stdout.split()
    assert version == requirement.split("==")[1]
    assert lacking == []


def test_the_backend_uses_what_the_check_looks_for():
    used = set().union(*(used_attributes(path.read_text()) for path in SOURCES))
    assert {
        "Builder.build_serialized_network",
        "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
        "ICudaEngine.create_runtime_config",
        "IExecutionContext.execute_async_v3",
        "IRuntimeCache.deserialize",
        "IRuntimeConfig.set_runtime_cache",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse_from_file",
        "Runtime.deserialize_cuda_engine",
    } <= used
    assert not any(name.split(".")[-1].startswith(("add_plugin", "FP16")) for name in used)
