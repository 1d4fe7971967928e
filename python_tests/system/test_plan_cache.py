"""The plan cache: one build a key, checked on reading, whole files or none; proofs of plans."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.errors import refused
from support.streams import wait_until
from zsseg_rt import Engine, EngineConfig, engine
from zsseg_rt.backends.plan_cache import Plan, PlanCache
from zsseg_rt.errors import BackendError
from zsseg_rt.runtime.self_check import SelfCheck, StageCheck, prove_plans

PLAN_KEY = {
    "graph_name": "decoder", "graph_sha256": "ab" * 32, "runtime": "tensorrt-10.3.0",
    "target": "sm87-Orin", "precision": "float16", "shapes": {"classes": (1, 32, 1024)},
}  # fmt: skip


BUILT = Plan(data=b"plan bytes", report={"precision": "float16", "layers": []})


def test_a_cache_folder_that_is_a_file_is_a_warning(tmp_path, caplog):
    (tmp_path / "engines").write_text("in the way")
    plan = PlanCache(tmp_path, PLAN_KEY).get_or_build(lambda: BUILT)
    assert plan.data == b"plan bytes"
    assert plan.path is None
    assert "cannot write" in caplog.text
    assert (tmp_path / "engines").read_text() == "in the way"


def test_a_failing_build_stores_nothing_and_frees_the_lock(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        PlanCache(tmp_path, PLAN_KEY).get_or_build(fail)
    assert {path.suffix for path in (tmp_path / "engines").glob("*")} <= {".lock"}
    assert PlanCache(tmp_path, PLAN_KEY).get_or_build(lambda: BUILT).path is not None


def test_two_at_once_build_once(tmp_path, caplog):
    """One builds while the other waits for it."""
    caplog.set_level(logging.INFO)
    builds = []

    def build():
        wait_until(lambda: "waiting for another process" in caplog.text)
        builds.append(1)
        return BUILT

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(PlanCache(tmp_path, PLAN_KEY).get_or_build, build) for _ in "ab"]
        assert [job.result(90).data for job in jobs] == [b"plan bytes"] * 2
    assert builds == [1]


SAMPLE = "a" * 64
STAGES = ("image", "patch_embeds", "queries", "class_embeds", "mask_logits", "labels")


class Built:
    """A graph that a builder made, with the verdict that lies beside it."""

    def __init__(self, name, *outputs):
        self.plan_name, self.verdict = f"{name}.plan", {}
        self.outputs = tuple(SimpleNamespace(name=output) for output in outputs)
        self.golden_verdict, self.keep_golden_verdict = self.verdict.get, self.verdict.__setitem__


def prove(graphs, wrong=None, *, golden=SAMPLE, min_region_score=None):
    """How often the sample ran; it is wrong from one stage on."""
    runs = []

    def self_check():
        runs.append(1)
        first = STAGES.index(wrong) if wrong else len(STAGES)
        stages = [
            StageCheck(stage=stage, error=0.5 * (place >= first), tolerance=0.03)
            for place, stage in enumerate(STAGES)
        ]
        return SelfCheck(precision="float16", stages=tuple(stages))

    file = None if golden is None else SimpleNamespace(sha256=golden)
    bundle = SimpleNamespace(path="street.zsseg", golden=file)
    prove_plans(bundle, SimpleNamespace(min_region_score=min_region_score), graphs, self_check)
    return len(runs)


@pytest.fixture
def graphs():
    return {
        "image_encoder": Built("encoder", "patch_embeds"),
        "decoder": Built("decoder", "class_embeds"),
    }


def test_new_plans_run_the_sample_once(graphs):
    assert (prove(graphs), prove(graphs)) == (1, 0)
    assert all(graph.verdict == {SAMPLE: ""} for graph in graphs.values())


@pytest.mark.parametrize(
    ("wrong", "named"), [("patch_embeds", "encoder"), ("class_embeds", "decoder")]
)
def test_the_plan_that_fails_is_refused_by_name_now_and_later(graphs, wrong, named):
    for stage in (wrong, None):
        with refused(BackendError, "plan", f"{named}.plan", wrong):
            prove(graphs, stage)
    assert [graph.plan_name for graph in graphs.values() if graph.verdict] == [f"{named}.plan"]


def test_where_no_graph_is_to_blame_all_new_ones_are_named(graphs):
    graphs["decoder"].verdict[SAMPLE] = ""
    with refused(BackendError, "plan", "encoder.plan", "mask_logits") as caught:
        prove(graphs, "mask_logits")
    assert "decoder.plan" not in str(caught.value)


def test_what_the_sample_cannot_judge_is_not_refused(graphs, caplog):
    """Without a sample, or as regions are left out on purpose."""
    prove(graphs, "image", golden=None)
    assert "street.zsseg" in caplog.text
    graphs["region_encoder"] = Built("region_encoder", "region_embeds")
    prove(graphs, "mask_logits", min_region_score=0.1)
    assert [not graph.verdict for graph in graphs.values()] == [False, False, True]
    graphs["image_encoder"].verdict.clear()
    with refused(BackendError, "plan", "encoder.plan"):
        prove(graphs, "patch_embeds", min_region_score=0.1)


def test_an_engine_proves_its_plans_before_it_serves(monkeypatch):
    """OpenVINO's graphs stand for builds, of which one was found wrong before."""
    pytest.importorskip("openvino")
    load, graphs = engine.load_graphs, {}

    def load_built(*arguments, **settings):
        graphs.update(load(*arguments, **settings))
        for name, graph in graphs.items():
            graph.plan_name = f"{name}.plan"
            problem = "patch_embeds" if name == "image_encoder" else ""
            graph.golden_verdict = lambda sample, problem=problem: problem
        return graphs

    monkeypatch.setattr(engine, "load_graphs", load_built)
    bundle = Path(__file__).parents[1] / "bundles/v1/descriptor.zsseg"
    with refused(BackendError, "plan", "image_encoder.plan", "patch_embeds"):
        Engine(bundle, EngineConfig(device="cpu", backend="openvino"))
    with refused(BackendError, "graph"):  # the engine has closed what it had opened
        graphs["decoder"].session()
