"""Every TensorRT attribute the backend uses exists in every version it serves.

The real bindings are imported, each in a process of its own, against stub libraries: nothing of
TensorRT's runs.
"""

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from support import fake_tensorrt
from support.command_line import python

ROOT = Path(__file__).resolve().parents[2]
USED = """
Builder.build_serialized_network Builder.create_builder_config Builder.create_network
Builder.create_optimization_profile BuilderFlag.TF32 EngineInspector.get_engine_information
IBuilderConfig.add_optimization_profile IBuilderConfig.clear_flag
IBuilderConfig.profiling_verbosity IBuilderConfig.progress_monitor
IBuilderConfig.set_memory_pool_limit ICudaEngine.create_engine_inspector
ICudaEngine.create_execution_context IExecutionContext.execute_async_v3
IExecutionContext.get_tensor_shape IExecutionContext.infer_shapes IExecutionContext.profiler
IExecutionContext.set_input_shape IExecutionContext.set_tensor_address ILayer.get_input
ILayer.get_output ILayer.num_inputs ILayer.num_outputs ILayer.type ILogger.Severity.ERROR
ILogger.Severity.INTERNAL_ERROR ILogger.Severity.WARNING INetworkDefinition.get_input
INetworkDefinition.get_layer INetworkDefinition.get_output INetworkDefinition.num_inputs
INetworkDefinition.num_layers INetworkDefinition.num_outputs IOptimizationProfile.set_shape
IProfiler IProgressMonitor ITensor.dtype ITensor.get_dimension_name ITensor.name ITensor.shape
LayerInformationFormat.JSON MemoryPoolType.WORKSPACE NetworkDefinitionCreationFlag.STRONGLY_TYPED
OnnxParser.get_error OnnxParser.num_errors OnnxParser.parse_from_file ParserError.desc
ParserError.node_name ParserError.node_operator ProfilingVerbosity.DETAILED
Runtime.deserialize_cuda_engine
"""
USED_OF_RTX = """
ComputeCapability.__members__ CudaGraphStrategy.DISABLED CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
IBuilderConfig.num_compute_capabilities IBuilderConfig.set_compute_capability
ICudaEngine.create_runtime_config IRuntimeCache.deserialize IRuntimeCache.serialize
IRuntimeConfig.create_runtime_cache IRuntimeConfig.cuda_graph_strategy
IRuntimeConfig.set_runtime_cache
"""
# Prints a module's version, and which of some names it lacks.
CHECK = """
import functools, importlib, sys
module = importlib.import_module(sys.argv[1])
print(module.__version__)
for name in sys.argv[2:]:
    try:
        functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        print(name)
"""

# all that the bindings import from TensorRT's libraries
STUB = """
#define STUB(name) void* name(void) { return 0; }
STUB(createInferBuilder_INTERNAL) STUB(createInferRefitter_INTERNAL)
STUB(createInferRuntime_INTERNAL) STUB(createNvOnnxParserRefitter_INTERNAL)
STUB(createNvOnnxParser_INTERNAL) STUB(getBuilderPluginRegistry) STUB(getNvOnnxParserVersion)
STUB(getPluginRegistry) STUB(initLibNvInferPlugins)
"""
LIBRARIES = """
libnvinfer.so.10 libnvonnxparser.so.10 libnvinfer_plugin.so.10 libtensorrt_rtx.so.1
libnvinfer.so.11 libnvonnxparser.so.11 libnvinfer_plugin.so.11 libtensorrt_onnxparser_rtx.so.1
"""
SCRIPT = Path("tools/machines/fetch_tensorrt_bindings.py")
FETCHER = runpy.run_path(str(ROOT / SCRIPT))


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler found for the stub libraries")
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub.c").write_text(STUB)
    for name in LIBRARIES.split():
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(["cc", *flags, str(folder / "stub.c")], check=True)
    return folder


@pytest.mark.parametrize("requirement", FETCHER["BINDINGS"])
def test_bindings_have_all_that_the_backend_uses(requirement, stubs):
    target = FETCHER["FOLDER"] / requirement.replace("==", "-")
    if not target.is_dir():
        pytest.skip(f"no {requirement} for this Python: run {SCRIPT}")
    module = FETCHER["BINDINGS"][requirement]
    names = USED.split() + (USED_OF_RTX.split() if "rtx" in module else [])
    places = {"PYTHONPATH": str(target), "LD_LIBRARY_PATH": str(stubs)}
    done = python("-c", CHECK, module, *names, more_env=places)
    assert done.returncode == 0, done.stderr
    version, *lacking = done.stdout.split()
    assert version == requirement.split("==")[1]
    assert lacking == []


STANDS_FOR = {
    "Builder": "Builder", "Config": "IBuilderConfig", "Profile": "IOptimizationProfile",
    "Network": "INetworkDefinition", "OnnxParser": "OnnxParser", "Runtime": "Runtime",
    "CudaEngine": "ICudaEngine", "ExecutionContext": "IExecutionContext",
    "RuntimeConfig": "IRuntimeConfig", "RuntimeCache": "IRuntimeCache",
}  # fmt: skip


def test_what_the_stand_ins_offer_is_looked_for():
    """They are strict: the backend calls nothing that they have not."""
    for name, real in STANDS_FOR.items():
        offered = [each for each in vars(getattr(fake_tensorrt, name)) if each[0] != "_"]
        assert {f"{real}.{each}" for each in offered} <= {*USED.split(), *USED_OF_RTX.split()}
