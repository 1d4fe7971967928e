"""What an engine will take in memory is known before it is loaded, and can be limited."""

import re
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.backends.registry import Placement
from zsseg_rt.errors import BackendError, ConfigError
from zsseg_rt.onnx.memory import graph_memory
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.memory_plan import MemoryPlan, plan_memory

CPU = Placement(backend="openvino", device="cpu")


def test_the_most_that_is_alive_at_one_time_is_counted(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.zeros((8, 32), np.float32), "w")
    shape = onnx.numpy_helper.from_array(np.array([-1, 4, 8], np.int64), "shape")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["wide"]),  # x 8 + wide 32 elements a row
        helper.make_node("Relu", ["wide"], ["active"]),  # 32 + 32: the most
        helper.make_node("Reshape", ["active", "shape"], ["view"]),
        helper.make_node("ReduceSum", ["view"], ["y"], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", number, ["rows", 8])],
        [helper.make_tensor_value_info("y", number, [1, 1, 1])],
        [weight, shape],
    )
    path = tmp_path / "g.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)
    found = graph_memory(path, float_bytes=4, axes={"rows": 5})
    assert found.weights == 8 * 32 * 4 + 3 * 8
    assert found.activations == 5 * (32 + 32) * 4
    assert graph_memory(path, float_bytes=2, axes={"rows": 5}).activations == 5 * (32 + 32) * 2
    path.write_bytes(b"no graph")
    with refused(BackendError, None):
        graph_memory(path, float_bytes=4, axes={})


@pytest.fixture(scope="module")
def bundle():
    return Bundle.demo("scenes")


def plan(bundle, **settings) -> MemoryPlan:
    config = EngineConfig(device="cpu", **settings)
    return plan_memory(bundle, create_family(bundle, config), CPU, config)


def test_every_family_has_a_plan():
    stored = Path(__file__).parents[1] / "bundles/v1"
    for path in stored.glob("*.zsseg"):
        one = plan(Bundle.load(path), precision="float32")
        assert min(one.weights, one.activations) > 0


def test_an_engine_that_does_not_fit_is_refused_with_what_would(bundle):
    three = plan(bundle, precision="float32", num_lanes=3)
    needed = -(-three.total // 1_000_000)
    config = {"device": "cpu", "precision": "float32", "use_cache": False}
    Engine(bundle, EngineConfig(num_lanes=3, max_memory=needed, **config)).close()
    with refused(ConfigError, "max_memory", str(needed)) as caught:
        Engine(bundle, EngineConfig(num_lanes=3, max_memory=needed - 1, **config))
    assert "num_lanes=2" in str(caught.value)
    size = re.search(r"for (\d+)x(\d+) instead of (\d+)x(\d+)", str(caught.value))
    assert size
    assert int(size[1]) < int(size[3])
    Engine(bundle, EngineConfig(num_lanes=2, max_memory=needed - 1, **config)).close()
    with refused(ConfigError, "max_memory", "1") as caught:
        Engine(bundle, EngineConfig(max_memory=1, **config))
    assert "num_lanes=" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", 10**9])
def test_an_unfit_limit_is_refused(value):
    with refused(ConfigError, "max_memory"):
        EngineConfig(max_memory=value)
