"""Freshly built plans run the bundle's golden sample once; those that fail it are refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from support.errors import refused
from zsseg_rt import Engine, EngineConfig, engine
from zsseg_rt.errors import BackendError
from zsseg_rt.runtime.self_check import SelfCheck, StageCheck, prove_plans

SAMPLE = "a" * 64


class Built:
    """A graph that a builder made, with the verdict that lies beside it."""

    def __init__(self, name, *outputs):
        self.plan_name, self.verdict = f"{name}.plan", {}
        self.outputs = tuple(SimpleNamespace(name=output) for output in outputs)

    def golden_verdict(self, sample):
        return self.verdict.get(sample)

    def keep_golden_verdict(self, sample, problem):
        self.verdict[sample] = problem


class Checked:
    """An engine whose golden sample is wrong from one stage on."""

    def __init__(self, wrong=None, *, golden=SAMPLE, min_region_score=None):
        file = None if golden is None else SimpleNamespace(sha256=golden)
        self.bundle = SimpleNamespace(path="street.zsseg", golden=file)
        self.config = SimpleNamespace(min_region_score=min_region_score)
        self.wrong, self.runs = wrong, 0

    def self_check(self):
        self.runs += 1
        stages, error = [], 0.0
        for stage in ("image", "patch_embeds", "queries", "class_embeds", "mask_logits", "labels"):
            error = 0.5 if stage == self.wrong else error
            stages.append(StageCheck(stage=stage, error=error, tolerance=0.03))
        return SelfCheck(precision="float16", stages=tuple(stages))

    def prove(self, graphs):
        prove_plans(self.bundle, self.config, graphs, self.self_check)


@pytest.fixture
def graphs():
    return {
        "image_encoder": Built("encoder", "patch_embeds"),
        "decoder": Built("decoder", "class_embeds"),
    }


def test_new_plans_run_the_sample_once(graphs):
    engine = Checked()
    engine.prove(graphs)
    engine.prove(graphs)
    assert engine.runs == 1
    assert all(graph.verdict == {SAMPLE: ""} for graph in graphs.values())


@pytest.mark.parametrize(
    ("wrong", "named"), [("patch_embeds", "encoder"), ("class_embeds", "decoder")]
)
def test_the_plan_that_fails_is_refused_by_name_now_and_later(graphs, wrong, named):
    engine = Checked(wrong)
    for _ in range(2):
        with refused(BackendError, "plan", f"{named}.plan", wrong):
            engine.prove(graphs)
    assert [graph.plan_name for graph in graphs.values() if graph.verdict] == [f"{named}.plan"]
    assert engine.runs == 1


def test_where_no_graph_is_to_blame_all_new_ones_are_named(graphs):
    graphs["decoder"].verdict[SAMPLE] = ""
    with refused(BackendError, "plan", "encoder.plan", "mask_logits") as caught:
        Checked("mask_logits").prove(graphs)
    assert "decoder.plan" not in str(caught.value)


def test_another_sample_is_run_again(graphs):
    Checked(golden="b" * 64).prove(graphs)
    engine = Checked()
    engine.prove(graphs)
    assert engine.runs == 1


def test_graphs_that_nothing_built_are_trusted():
    engine = Checked("image")
    engine.prove({"image_encoder": SimpleNamespace(outputs=())})
    assert engine.runs == 0


def test_without_a_sample_a_warning_says_so(graphs, caplog):
    engine = Checked("image", golden=None)
    engine.prove(graphs)
    assert engine.runs == 0
    assert "street.zsseg" in caplog.text


def test_regions_that_are_left_out_on_purpose_do_not_count(graphs):
    graphs["region_encoder"] = Built("region_encoder", "region_embeds")
    Checked("mask_logits", min_region_score=0.1).prove(graphs)
    assert [not graph.verdict for graph in graphs.values()] == [False, False, True]
    graphs["image_encoder"].verdict.clear()
    with refused(BackendError, "plan", "encoder.plan"):
        Checked("patch_embeds", min_region_score=0.1).prove(graphs)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_engine_proves_its_plans_before_it_serves(monkeypatch, damaged):
    """OpenVINO's graphs stand for builds; a damaged one gives another encoder's patches."""
    pytest.importorskip("openvino")
    load, made = engine.load_graphs, {}

    def load_built(*given, **settings):
        graphs = load(*given, **settings)
        for name, graph in graphs.items():
            wrong = "patch_embeds" if damaged and name == "image_encoder" else None
            made[name] = BuiltOf(graph, name, wrong)
        return made

    monkeypatch.setattr(engine, "load_graphs", load_built)
    bundle = Path(__file__).parents[1] / "bundles/v1/descriptor.zsseg"
    if not damaged:
        Engine(bundle, EngineConfig(device="cpu", backend="openvino")).close()
        assert [list(graph.verdict.values()) for graph in made.values()] == [[""], [""]]
        return
    with refused(BackendError, "plan", "image_encoder.plan", "patch_embeds"):
        Engine(bundle, EngineConfig(device="cpu", backend="openvino"))
    assert ["patch_embeds" in text for text in made["image_encoder"].verdict.values()] == [True]
    assert made["decoder"].verdict == {}
    with refused(BackendError, "graph"):  # the engine has closed what it had opened
        made["decoder"].session()


class BuiltOf(Built):
    """A graph as a build, of whose results one may be wrong."""

    def __init__(self, graph, name, wrong):
        super().__init__(name)
        self.graph, self.wrong, self.outputs = graph, wrong, graph.outputs

    def __getattr__(self, name):
        return getattr(self.graph, name)

    def session(self):
        session = self.graph.session()
        run = session.run

        def run_wrongly(feeds, *, stream=0):
            results = dict(run(feeds, stream=stream))
            return results | {self.wrong: results[self.wrong] * 1.5} if self.wrong else results

        session.run = run_wrongly
        return session
