"""Several systems side by side: every run once, resumable, and a table of the figures."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
pytest.importorskip("accelerate", reason="needs pip install '.[train]'")

from support.errors import refused  # noqa: E402
from support.small_runs import TABLES, save_clip  # noqa: E402
from tools.studies import comparison  # noqa: E402
from tools.studies.comparison import (  # noqa: E402
    Comparison,
    RunFigures,
    SmallForm,
    Variant,
)
from zsseg_rt.errors import ArgumentError, TrainingError  # noqa: E402
from zsseg_rt.torch_files.clip_weights import load_clip  # noqa: E402
from zsseg_rt.training.config import TrainConfig  # noqa: E402
from zsseg_rt.training.trained.card import load_trained  # noqa: E402

WORLD = {"name": "scenes", "options": {"size": 64, "length": 8}}
OPTIONS = {"activation": "quick_gelu", "image_size": 64}


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny.safetensors")


def three_variants(clip_file):
    shared = {
        **TABLES,
        "data": {"augmentation": TABLES["data"]["augmentation"]} | WORLD,
        "model": {"options": {**OPTIONS, "pretrained": str(clip_file)}},
        "evaluation": {"options": {"size": 64, "length": 2}},
    }
    untrained = {"model": {"architecture": "dense_clip", "options": {"head": "naclip"}}}
    prompted = {"model": {"options": {"num_prompts": 2}}}
    self_training = {"task": {"protocol": "transductive"}, "loop": {"iterations": 1}}
    return Comparison(
        shared=shared,
        variants=(
            Variant(name="naclip", title="untrained", changes=untrained, trained=False),
            Variant(name="zegclip", title="ZegCLIP", changes=prompted),
            Variant(name="st", title="self", changes=self_training, start_from="zegclip"),
        ),
        seeds=(0, 1),
    )


@pytest.mark.nightly
def test_every_run_is_done_once_and_can_be_loaded(clip_file, tmp_path):
    chosen = three_variants(clip_file)
    told = []
    runs = comparison.run(chosen, tmp_path, on_run=told.append)
    assert runs == told
    rows = [(run.variant, run.seed) for run in runs]
    assert rows == [("naclip", None), ("zegclip", 0), ("st", 0), ("zegclip", 1), ("st", 1)]
    assert all(0 <= run.metrics["pAcc"] <= 100 for run in runs)
    first, second = load_trained(tmp_path / "zegclip-0"), load_trained(tmp_path / "zegclip-1")
    weights = [m.decode_head.q_proj.weight for m in (first, second)]
    assert not torch.equal(*weights)
    assert load_trained(tmp_path / "st-0").config.self_trained
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert comparison.run(chosen, tmp_path) == runs
    assert {path: path.stat().st_mtime_ns for path in marks} == marks  # nothing ran again


def test_only_the_named_variants_run(clip_file, tmp_path):
    runs = comparison.run(three_variants(clip_file), tmp_path, only=("naclip",))
    assert [run.variant for run in runs] == ["naclip"]
    recorded = json.loads((tmp_path / "naclip" / "figures.json").read_text())
    assert recorded == runs[0].metrics
    with refused(ArgumentError, "only"):
        comparison.run(three_variants(clip_file), tmp_path, only=("other",))


def test_figures_of_other_settings_are_not_taken(clip_file, tmp_path):
    chosen = three_variants(clip_file)
    comparison.run(chosen, tmp_path, only=("naclip",))
    shorter = {"evaluation": {"options": {"size": 64, "length": 1}}}
    with refused(ArgumentError, None, "evaluation.options"):
        comparison.run(chosen, tmp_path, only=("naclip",), changes=shorter)


def test_an_interrupted_run_leaves_no_figures(clip_file, tmp_path, monkeypatch):
    def stop_at_once(parts, *, resume):
        folder = Path(parts.config.output.folder)
        folder.mkdir(parents=True)
        return SimpleNamespace(run_folder=folder, step=1, finished=False, metrics={"pAcc": 1.0})

    monkeypatch.setattr("zsseg_rt.training.assembly.train_assembled", stop_at_once)
    with refused(TrainingError, None, "zegclip-0", "2", "1"):
        comparison.run(three_variants(clip_file), tmp_path, only=("zegclip",))
    assert not list(tmp_path.rglob("figures.json"))


TINY_CLIP = {"steps": 2, "batch_size": 4, "warmup_steps": 1, "width": 64, "num_layers": 1}
TINY_CLIP |= {"text_width": 64, "text_layers": 1, "embed_dim": 32, "whole_every": 2}


def test_a_comparison_makes_the_clip_that_it_starts_from(tmp_path):
    chosen = Comparison(
        shared={"loop": {"iterations": 9, "batch_size": 3}},
        variants=(Variant(name="a", title="A"),),
        clip=TINY_CLIP,
        small=SmallForm(seeds=(4,), clip={"steps": 1}, changes={"loop": {"iterations": 2}}),
    )
    small = chosen.in_small()
    assert small.seeds == (4,)
    assert small.shared == {"loop": {"iterations": 2, "batch_size": 3}}
    assert small.variants == chosen.variants
    weights = comparison.make_clip(small, tmp_path)
    assert load_clip(weights, activation="quick_gelu").text["text_projection"].shape == (64, 32)
    before = weights.read_bytes()
    assert comparison.make_clip(small, tmp_path) == weights
    assert weights.read_bytes() == before
    with refused(TrainingError, None, "config.json"):
        comparison.make_clip(chosen, tmp_path)


def test_a_clip_that_cannot_be_made_is_refused(tmp_path):
    chosen = Comparison(shared={}, variants=(), clip={"stps": 1})
    with refused(ArgumentError, "clip"):
        comparison.make_clip(chosen, tmp_path)
    assert not list(tmp_path.iterdir())
    assert comparison.make_clip(Comparison(shared={}, variants=()), tmp_path) is None
    with refused(ArgumentError, "small"):
        chosen.in_small()


def test_the_shipped_comparison_has_a_small_form():
    chosen = Comparison.load("scenes")
    small = chosen.in_small()
    assert small.clip["steps"] < chosen.clip["steps"]
    assert small.shared["loop"]["iterations"] < chosen.shared["loop"]["iterations"]
    assert small.variants == chosen.variants


def test_table_gives_mean_and_deviation():
    chosen = Comparison(
        shared={},
        variants=(Variant(name="a", title="System A"), Variant(name="b", title="System B")),
    )
    figures = {"pAcc": 80.0, "mIoU(S)": 60.0, "mIoU(U)": 40.0, "hIoU": 48.0}
    better = {name: value + 2 for name, value in figures.items()}
    runs = [
        RunFigures(variant="a", seed=seed, metrics=m) for seed, m in enumerate((figures, better))
    ]
    lines = comparison.markdown_table(chosen, runs).splitlines()
    assert lines[0] == "| system | runs | pAcc | mIoU(S) | mIoU(U) | hIoU |"
    assert lines[2:] == ["| System A | 2 | 81.0 ± 1.4 | 61.0 ± 1.4 | 41.0 ± 1.4 | 49.0 ± 1.4 |"]


@pytest.mark.parametrize(
    ("variants", "argument"),
    [
        ([Variant(name="a", title=""), Variant(name="a", title="")], "variants"),
        ([Variant(name="a", title="", start_from="b")], "variants"),
    ],
)
def test_a_comparison_that_cannot_run_is_refused(variants, argument):
    with refused(ArgumentError, argument):
        Comparison(shared={}, variants=tuple(variants))


@pytest.mark.parametrize("name", comparison.list_comparisons())
def test_the_packages_comparisons_are_complete(name):
    chosen = Comparison.load(name)
    for variant in chosen.variants:
        raw = comparison.merge(chosen.shared, variant.changes)
        TrainConfig.from_dict(raw)
    assert len(chosen.variants) > 1
    with pytest.raises(ArgumentError, match=f"one of the comparisons .*{name}"):
        Comparison.load(f"{name}s")
