"""Studies and tools that make what ships: a run of the least size of each."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs pip install '.[train]'")
pytest.importorskip("accelerate", reason="needs pip install '.[train]'")


from support.errors import refused  # noqa: E402
from tools.scenes import CLASS_NAMES, SEEN, words_of_world  # noqa: E402
from tools.studies import clip_pretraining, compare_systems  # noqa: E402
from tools.studies.make_demo import DemoConfig, train_demo, write_demo  # noqa: E402
from tools.studies.name_draws import measure_bundle  # noqa: E402
from tools.studies.small_clip import PretrainingConfig  # noqa: E402
from zsseg_rt import Bundle  # noqa: E402
from zsseg_rt.demo import demo_bundle  # noqa: E402
from zsseg_rt.errors import ArgumentError  # noqa: E402
from zsseg_rt.training.config import TrainConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CLIP = PretrainingConfig(
    steps=3, batch_size=4, warmup_steps=1, checkpoint_interval=2, view_size=32, whole_every=2,
    width=64, num_layers=1, text_width=64, text_layers=1, embed_dim=32,
)  # fmt: skip


@pytest.mark.nightly
def test_the_demo_is_made_with_its_words_and_history(tmp_path):
    clip = clip_pretraining.pretrain(CLIP, tmp_path, num_workers=0)
    config = DemoConfig(iterations=2, batch_size=2, warmup_steps=1, num_prompts=2, num_scenes=4)
    model = train_demo(clip, config, tmp_path / "run")
    bundle = Bundle.load(write_demo(model, clip, config, tmp_path, commit="abc"))
    bundle.verify()
    assert bundle.text.words == words_of_world()
    assert bundle.head.seen == tuple(CLASS_NAMES[index] for index in SEEN)
    assert json.loads(bundle.provenance["source"])["commit"] == "abc"


def test_the_bundle_that_ships_is_measured_with_its_record():
    report = measure_bundle(demo_bundle("scenes"), draws=[0], length=4, root=ROOT)
    assert all((report["bundle_sha256"], report["commit"], report["machine"]["cpu"]))
    assert report["summary"]["others"]["mIoU(U)"]["mean"] == report["draws"][0]["others"]["mIoU(U)"]


@pytest.mark.parametrize("name", compare_systems.list_comparisons())
def test_comparisons_name_what_can_be_trained(name):
    study = compare_systems.Comparison.load(name)
    for variant in study.variants:
        TrainConfig.from_dict(compare_systems.merge(study.shared, variant.changes))
    assert len(study.variants) > 1


def test_a_comparison_keeps_figures_of_its_settings_alone(tmp_path):
    small = {"evaluation": {"options": {"size": 64, "length": 2}}}
    study = compare_systems.Comparison(
        shared={
            "data": {"name": "scenes", "options": {"size": 64, "length": 8}},
            "model": {"architecture": "dense_clip", "options": {"pretrained": "demo"}},
            **small,
        },
        variants=(compare_systems.Variant(name="clip", title="untrained", trained=False),),
    )
    (run,) = compare_systems.run(study, tmp_path)
    assert json.loads((tmp_path / "clip" / "figures.json").read_text()) == run.metrics
    assert "| untrained | 1 |" in compare_systems.markdown_table(study, [run])
    with refused(ArgumentError, None, "evaluation.options"):
        compare_systems.run(study, tmp_path, changes={"evaluation": {"options": {"length": 1}}})
