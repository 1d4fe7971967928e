"""Heads on cached features: few steps show that rows differ as they should and runs are kept."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")

from support.errors import refused  # noqa: E402
from tools.studies.cached_heads import (  # noqa: E402
    ROWS,
    HeadSettings,
    open_world,
    train_head,
)
from zsseg_rt.errors import ArgumentError  # noqa: E402

ROOT = Path(__file__).parents[2]
SHORT = HeadSettings(steps=2, batch_size=4, num_scenes=8, num_judged=6, warmup_steps=1)


@pytest.fixture(scope="module")
def world():
    return open_world("demo", {}, SHORT)


@pytest.mark.nightly
@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_and_is_judged(world, row):
    figures = train_head(ROWS[row], world, SHORT, seed=0)
    assert all(0 <= figures[name] <= 100 for name in ("pAcc", "mIoU(S)", "mIoU(U)"))


@pytest.mark.nightly
def test_a_head_that_knows_the_match_is_ahead_from_the_start(world):
    found = {
        name: train_head(ROWS[name], world, SHORT, seed=0)["pAcc"]
        for name in ("cosine", "cosine_rotated", "zegclip_cross_entropy", "aligned_cross_entropy")
    }
    assert found["cosine"] > found["cosine_rotated"] + 5
    assert found["aligned_cross_entropy"] > found["zegclip_cross_entropy"] + 5


@pytest.mark.nightly
def test_a_run_depends_on_its_seed_alone(world):
    first, again, other = (train_head(ROWS["zegclip"], world, SHORT, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_more_names_are_more_classes():
    world = open_world("demo", {"annotated": 60}, SHORT)
    assert len(world.text_embeds) == 69
    assert len(world.seen) == 60


def test_heads_are_judged_on_other_unseen_names_too(world):
    """With the published names in a draw's place, its figures are the published ones."""
    settings = replace(SHORT, num_draws=2, num_drawn=3)
    drawn = open_world("demo", {"split": "train_seen"}, settings)
    assert [len(features.labels) for features, _ in drawn.drawn] == [3, 3]
    assert not torch.equal(drawn.drawn[0][1], drawn.text_embeds)
    assert not torch.equal(drawn.train.patch_embeds, world.train.patch_embeds)
    same = replace(world, drawn=((world.judged, world.text_embeds),) * 2)
    figures = train_head(ROWS["aligned"], same, SHORT, seed=0)
    for name in ("pAcc", "mIoU(S)", "mIoU(U)"):
        assert figures[f"others {name}"] == pytest.approx(figures[name])
    assert figures["others sd of mIoU(U)"] == 0
    assert figures["others least mIoU(U)"] == figures["mIoU(U)"]


def test_settings_out_of_range_are_refused():
    with refused(ArgumentError, "num_judged"):
        HeadSettings(num_judged=0)
    with refused(ArgumentError, "warmup_steps"):
        HeadSettings(steps=5)


def call(out, *more):
    given = "--steps 2 --warmup-steps 1 --num-scenes 4 --num-judged 2 --batch-size 2 --threads 1"
    rows = "--rows cosine aligned --worlds as_published one_thing --seeds 0"
    tool = (sys.executable, "-m", "tools.studies.compare_heads")
    arguments = [*tool, "--out", out, *given.split(), *rows.split(), *more]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=600)


@pytest.mark.nightly
def test_the_tool_writes_each_run_once(tmp_path):
    out = tmp_path / "heads.json"
    done = call(out)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    runs = [(run["world"], run["row"], run["seed"]) for run in content["runs"]]
    assert runs == [(w, r, 0) for w in ("as_published", "one_thing") for r in ("cosine", "aligned")]
    again = call(out)
    assert again.returncode == 0
    assert again.stdout == ""  # nothing ran again
    other = call(out, "--learning-rate", "1e-4")
    assert other.returncode == 1
    assert "expected runs of these settings" in other.stderr
