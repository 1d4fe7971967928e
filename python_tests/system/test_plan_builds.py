"""Plans are built ahead of time in processes of their own, for the engine to find."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from support.errors import refused
from zsseg_rt import Bundle
from zsseg_rt.backends._tensorrt import BACKEND
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.cli import main
from zsseg_rt.errors import ArgumentError, BackendError, DeviceError, PrecisionNotApplied
from zsseg_rt.ops import cuda_device_count
from zsseg_rt.runtime import plan_builds
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.plan_builds import BuildSettings, build_plans

pytestmark = pytest.mark.usefixtures("rtx")

STORED = Path(__file__).parents[1] / "bundles/v1"


def test_an_engine_of_that_gpu_finds_the_plans(tmp_path):
    bundle = Bundle.load(STORED / "descriptor.zsseg")
    steps = []
    settings = BuildSettings(compute_capability="8.9", precision="float16", cache_dir=tmp_path)
    plans = list(build_plans(bundle, settings, lambda *step: steps.append(step)))
    family = create_family(bundle, plan_builds.EngineConfig())
    assert [plan.graph for plan in plans] == list(family.graphs)
    assert {name for name, _ in steps} == set(family.graphs)
    for plan in plans:
        assert (plan.precision, plan.was_there) == ("float16", False)
        assert plan.path.stat().st_size == plan.size
        assert plan.peak > plan.size
        options = BackendOptions(
            compute_capability="8.9",
            cache_dir=tmp_path,
            dynamic_axes=family.axes,
            progress=pytest.fail,
        )
        graph = bundle.open_path(bundle.graph(plan.graph, "float16"))
        assert BACKEND.build_plan(graph, precision="float16", options=options).path == plan.path
    assert [plan.was_there for plan in build_plans(bundle, settings)] == [True] * len(plans)


def test_the_command_says_what_it_needs_and_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    call = ["build", str(STORED / "dense.zsseg"), "--compute-capability", "8.6"]
    assert main([*call, "--workspace", "64", "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    (planned,), (plan,) = report["planned"], report["plans"]
    assert planned["graph"] == plan["graph"] == "image_encoder"
    assert planned["peak"] > planned["weights"] > 0 < planned["activations"]
    assert Path(plan["path"]).parent == tmp_path / "home" / "engines"
    assert plan["path"] in capsys.readouterr().out
    assert main(call) == 0
    assert "was there" in capsys.readouterr().out


def test_a_killed_build_is_reported_and_nothing_is_kept(tmp_path, monkeypatch):
    bundle = Bundle.load(STORED / "descriptor.zsseg")
    settings = BuildSettings(compute_capability="8.9", cache_dir=tmp_path)
    for script, said in (("read line; kill -9 $$", "MB"), ("echo lost >&2; exit 1", "lost")):
        monkeypatch.setattr(plan_builds, "COMMAND", ("sh", "-c", script))
        with refused(BackendError, "image_encoder", said):
            list(build_plans(bundle, settings))
    assert list(tmp_path.glob("engines/*")) == []


def test_an_interrupted_build_ends_its_process(tmp_path, monkeypatch, capsys):
    child, new = tmp_path / "child", tmp_path / "new"
    script = f"read line; echo $$ > {new}; mv {new} {child}; exec sleep 600"
    monkeypatch.setattr(plan_builds, "COMMAND", ("sh", "-c", script))
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))

    def interrupt():
        while not child.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["build", str(STORED / "dense.zsseg"), "--compute-capability", "8.6"]) == 1
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_what_cannot_be_built_is_refused(tmp_path):
    bundle = Bundle.load(STORED / "descriptor.zsseg")
    settings = BuildSettings(compute_capability="8.9", cache_dir=tmp_path)
    with refused(BackendError, "compute_capability", "8.7"):
        list(build_plans(bundle, replace(settings, compute_capability="8.7")))
    with refused(PrecisionNotApplied, "precision", "int8"):
        list(build_plans(bundle, replace(settings, precision="int8")))
    with refused(ArgumentError, "workspace", "16", "8"):
        BuildSettings(workspace=8)
    (tmp_path / "file").touch()
    with refused(ArgumentError, "cache_dir"):
        list(build_plans(bundle, replace(settings, cache_dir=tmp_path / "file")))
    if cuda_device_count() == 0:
        with refused(DeviceError, "compute_capability", "8.9"):
            list(build_plans(bundle, replace(settings, compute_capability=None)))
