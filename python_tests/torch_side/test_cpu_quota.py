"""How many CPUs a process takes by default: its affinity, and the quota of its control groups."""

import math
import os

import numpy as np
import pytest

from zsseg_rt import Engine, EngineConfig
from zsseg_rt.common import process
from zsseg_rt.common.process import cpu_quota, threads_in_quota, usable_cpus
from zsseg_rt.doctor import examine
from zsseg_rt.evaluation.provenance import describe_machine
from zsseg_rt.integrations.batch import lanes_for

GROUPS = "sys/fs/cgroup"


def version_1(group, quota):
    return {f"{group}/cpu.cfs_quota_us": str(quota), f"{group}/cpu.cfs_period_us": "100000"}


CASES = {
    "container": ("0::/", {"cpu.max": "150000 100000"}, 1.5),
    "no limit": ("0::/", {"cpu.max": "max 100000"}, math.inf),
    "service": ("0::/a.slice/b.service", {"a.slice/b.service/cpu.max": "50000 100000"}, 0.5),
    "group above": ("0::/a/b", {"a/b/cpu.max": "max 1000", "a/cpu.max": "2000 1000"}, 2.0),
    "the least": ("0::/a/b", {"a/b/cpu.max": "3000 1000", "a/cpu.max": "2000 1000"}, 2.0),
    "path of the host": ("0::/docker/12ab", {"cpu.max": "250000 100000"}, 2.5),
    "path outside": ("0::/../other", {"cpu.max": "100000 100000"}, 1.0),
    "version 1": (
        "5:memory:/x\n4:cpu,cpuacct:/docker/12ab",
        version_1("cpu,cpuacct/docker/12ab", 400000),
        4.0,
    ),
    "version 1 in a container": ("4:cpu,cpuacct:/docker/12ab", version_1("cpu", 150000), 1.5),
    "version 1 without a limit": ("4:cpu:/", version_1("cpu", -1), math.inf),
    "other controllers": ("2:cpuset:/", version_1("cpuset", 100000), math.inf),
    "both versions": ("4:cpu:/\n0::/", version_1("cpu", 100000), 1.0),
    "empty": ("", {}, math.inf),
    "garbage": ("0::/\nnonsense", {"cpu.max": "\n"}, math.inf),
    "zero": ("0::/", {"cpu.max": "0 100000"}, math.inf),
}


@pytest.mark.parametrize(("groups", "files", "quota"), CASES.values(), ids=CASES)
def test_the_quota_is_read_from_control_groups(tmp_path, groups, files, quota):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, content in files.items():
        path = tmp_path / GROUPS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cpu_quota(tmp_path) == quota


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("cpus_run_on", "quota", "used", "limit"),
    [
        (8, math.inf, 8, 0),
        (8, 8.0, 8, 0),
        (8, 20.0, 8, 0),
        (8, 7.5, 8, 0),
        (8, 2.0, 2, 2),
        (8, 1.2, 2, 2),
        (8, 0.1, 1, 1),
        (1, 0.5, 1, 0),
    ],
)
def test_a_quota_is_rounded_up(monkeypatch, cpus_run_on, quota, used, limit):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus_run_on)))
    monkeypatch.setattr(process, "cpu_quota", lambda: quota)
    assert (usable_cpus(), threads_in_quota()) == (used, limit)


@pytest.fixture
def quota_of_three(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(process, "cpu_quota", lambda: 2.5)


@pytest.mark.usefixtures("quota_of_three")
def test_an_engine_keeps_to_the_quota(colour_bundle):
    config = EngineConfig(device="cpu", use_cache=False)
    assert lanes_for(100, config) == 3
    with Engine(colour_bundle, config) as engine:
        engine.set_classes(["red", "blue"])
        assert engine.segment(np.zeros((8, 8, 3), np.uint8)).labels.shape == (8, 8)
        assert engine.config == config


@pytest.mark.usefixtures("quota_of_three")
def test_reports_name_the_quota():
    assert examine()[0].detail.partition(", ")[2].startswith("3 usable CPU(s)")
    assert describe_machine()["usable_cpus"] == "3"


@pytest.mark.usefixtures("quota_of_three")
def test_loaders_keep_to_the_quota():
    pytest.importorskip("torch", reason="needs pip install '.[train]'")
    from zsseg_rt.training.data import default_num_workers

    assert default_num_workers() == 2
