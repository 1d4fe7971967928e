"""An engine's needs: memory, known before it is loaded and limited, and CPUs."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from support.graphs import FLOAT, node, write_graph
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.backends.registry import Placement
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.common import process
from zsseg_rt.common.process import cpu_quota, threads_in_quota, usable_cpus
from zsseg_rt.doctor import examine
from zsseg_rt.errors import BackendError, ConfigError
from zsseg_rt.evaluation.provenance import describe_machine
from zsseg_rt.integrations.batch import lanes_for
from zsseg_rt.onnx.check import graph_memory
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.memory_plan import plan_memory


def test_the_most_that_is_alive_at_one_time_is_counted(tmp_path):
    weights = {"w": np.zeros((8, 32), np.float32), "shape": np.array([-1, 4, 8], np.int64)}
    nodes = [
        node("MatMul", "x w", "wide"),  # x 8 + wide 32 elements a row
        node("Relu", "wide", "active"),  # 32 + 32: the most
        node("Reshape", "active shape", "view"),
        node("ReduceSum", "view", "y", keepdims=1),
    ]
    ends = {"x": (FLOAT, ["rows", 8])}, {"y": (FLOAT, [1, 1, 1])}
    path = write_graph(tmp_path / "g.onnx", nodes, *ends, weights)
    plan = graph_memory(path, float_bytes=4, axes={"rows": 5})
    assert plan.weights == 8 * 32 * 4 + 3 * 8
    assert plan.activations == 5 * (32 + 32) * 4
    assert graph_memory(path, float_bytes=2, axes={"rows": 5}).activations == 5 * (32 + 32) * 2
    path.write_bytes(b"no graph")
    with refused(BackendError, None):
        graph_memory(path, float_bytes=4, axes={})


def plan(bundle, **settings):
    config = EngineConfig(device="cpu", **settings)
    placement = Placement(backend="openvino", device="cpu")
    return plan_memory(bundle, create_family(bundle, config), placement, config)


def test_every_family_has_a_plan():
    for family in FAMILIES:
        path = Path(__file__).parents[1] / f"bundles/v1/{family}.zsseg"
        one = plan(Bundle.load(path), precision="float32")
        assert min(one.weights, one.activations) > 0


def test_an_engine_that_does_not_fit_is_refused_with_what_would():
    bundle = Bundle.demo("scenes")
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
    for value in (0, -1, 1.5, "many", 10**9):
        with refused(ConfigError, "max_memory"):
            EngineConfig(max_memory=value)


# --- CPUs by default: the process's affinity, and the quota of its control groups ---


def version_1(group, quota):
    return {f"{group}/cpu.cfs_quota_us": str(quota), f"{group}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "max 1000", "a/cpu.max": "2000 1000"}, 2.0),
        ("0::/a/b", {"a/b/cpu.max": "3000 1000", "a/cpu.max": "2000 1000"}, 2.0),
        ("0::/docker/12ab", {"cpu.max": "250000 100000"}, 2.5),  # a path of the host
        ("0::/../other", {"cpu.max": "100000 100000"}, 1.0),
        ("4:cpu,cpuacct:/docker/12ab", version_1("cpu,cpuacct/docker/12ab", 400000), 4.0),
        ("5:memory:/x\n4:cpu:/\n0::/", version_1("cpu", 100000), 1.0),
        ("0::/\nnonsense", {"cpu.max": "\n"}, math.inf),
        ("0::/", {"cpu.max": "0 100000"}, math.inf),
    ],
)
def test_the_quota_is_read_from_control_groups(tmp_path, groups, files, quota):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cpu_quota(tmp_path) == quota


def test_a_quota_is_rounded_up(monkeypatch):
    """Of CPUs to run on and a quota: what is used, and the limit that a pool is given."""
    for cpus, quota, used, limit in (
        (8, math.inf, 8, 0), (8, 8.0, 8, 0), (8, 7.5, 8, 0), (8, 1.2, 2, 2), (8, 0.1, 1, 1),
        (1, 0.5, 1, 0),
    ):  # fmt: skip
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cpus: set(range(n)))
        monkeypatch.setattr(process, "cpu_quota", lambda quota=quota: quota)
        assert (usable_cpus(), threads_in_quota()) == (used, limit)


def test_an_engine_and_reports_keep_to_the_quota(colour_bundle, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(process, "cpu_quota", lambda: 2.5)
    config = EngineConfig(device="cpu", use_cache=False)
    assert lanes_for(100, config) == 3
    with Engine(colour_bundle, config) as engine:
        engine.set_classes(["red", "blue"])
        assert engine.segment(np.zeros((8, 8, 3), np.uint8)).labels.shape == (8, 8)
        assert engine.config == config
    assert examine()[0].detail.partition(", ")[2].startswith("3 usable CPU(s)")
    assert describe_machine()["usable_cpus"] == "3"
