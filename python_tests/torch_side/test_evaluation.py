"""Torch models and bundles are evaluated one way, as papers do, and in studies."""

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from onnx import helper
from PIL import Image

pytest.importorskip("accelerate")

from benchmarks.papers.__main__ import main as evaluate_as
from benchmarks.papers.protocol import papers, read_protocol
from support import tiny, tiny_zegformer
from support.cells import dense_bundle
from support.command_line import run as command
from support.errors import refused
from support.small_runs import build_voc, listing, mask, photo
from tools.scenes import CLASS_NAMES, SEEN, SceneDataset, words_of_world
from tools.studies import clip_pretraining, compare_systems
from tools.studies.make_demo import DemoConfig, train_demo, write_demo
from tools.studies.name_draws import measure_bundle
from tools.studies.small_clip import PretrainingConfig
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.demo import demo_bundle
from zsseg_rt.errors import (
    ArgumentError,
    CheckpointError,
    DatasetError,
    DeviceError,
    VocabularyError,
)
from zsseg_rt.evaluation.datasets.published import PUBLISHED
from zsseg_rt.evaluation.evaluate import EngineSegmenter, evaluate
from zsseg_rt.models.base import SlideSettings, slide_predict
from zsseg_rt.training.class_embeddings import embed_phrases
from zsseg_rt.training.config import TrainConfig
from zsseg_rt.training.loop.checkpointing import Checkpoint, CheckpointFolder
from zsseg_rt.training.trained import (
    TorchSegmenter,
    TrainedClasses,
    describe_model,
    trained_segmenter,
)


class Oracle:
    """Knows the answer."""

    class_names = CLASS_NAMES

    def __init__(self, dataset):
        samples = [dataset[index] for index in range(len(dataset))]
        self.answers = {sample.image.tobytes(): sample.labels for sample in samples}

    def segment(self, image):
        labels = self.answers[image.tobytes()]
        return np.where(labels == 255, 0, labels).astype(np.uint8)

    def describe(self):
        return {"kind": "oracle"}


@pytest.fixture
def scenes():
    return SceneDataset("val", length=5)


def test_a_perfect_segmenter_scores_one_hundred(scenes):
    result = evaluate(Oracle(scenes), scenes)
    assert set(result.scores.as_reported().values()) == {100.0}
    assert result.counts.sum() == sum((scenes[i].labels != 255).sum() for i in range(5))
    assert result.pictures == result.dataset_size == 5


@pytest.mark.parametrize(("limit", "expected"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (9, None)])
def test_a_limit_spreads_over_the_set(scenes, limit, expected):
    shown, read = [], []

    class Watched(SceneDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    oracle, count, watched = Oracle(scenes), len(expected or range(5)), Watched("val", length=5)
    evaluate(oracle, watched, limit=limit, on_picture=lambda *pair: shown.append(pair))
    assert shown == [(done, count) for done in range(1, count + 1)]
    assert read == (expected or list(range(5)))


SEVEN = tuple(f"name {index}" for index in range(7))


def noise(seed):
    """Blurred, so that a random model gives many classes."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)
    return cv2.resize(small, (110, 90))


def test_slide_is_the_official_protocol_and_the_best_synonym_counts():
    model, embeds = tiny.zegclip_model(), tiny.text_embeds(7, 32)
    seen = [SEVEN[index] for index in model.config.seen_classes]
    windows, image = SlideSettings(short_side=96, crop_size=64, stride=53), noise(0)
    segmenter = TorchSegmenter(
        model, SEVEN, embeds, seen_names=seen, protocol="slide", windows=windows
    )
    expected = slide_predict(model, image, embeds, short_side=96, crop_size=64, stride=53)
    np.testing.assert_array_equal(segmenter.segment(image), expected.argmax(0).numpy())
    assert len(np.unique(expected.argmax(0))) > 1
    usual = TorchSegmenter(model, SEVEN, embeds, protocol="slide").describe()["windows"]
    assert usual == {"short_side": 64, "crop_size": 64, "stride": 53}  # as the official ones
    plain = TorchSegmenter(model, SEVEN, embeds).segment(image)
    merged = TorchSegmenter(model, ["a, b, c", "d", "e, f", "g"], embeds).segment(image)
    np.testing.assert_array_equal(merged, np.array([0, 0, 0, 1, 2, 2, 3])[plain])


def test_zegformer_is_resized_and_labelled_as_officially():
    model = tiny_zegformer.model()
    embeds, region = (tiny_zegformer.text_features(salt) for salt in "ab")
    image, model.config = noise(0), replace(model.config, image_size=64)
    segmenter = TorchSegmenter(model, SEVEN, embeds, region_embeds=region, seen_names=SEVEN[:5])
    resized = np.array(Image.fromarray(image).resize((78, 64), Image.Resampling.BILINEAR))
    planes = torch.from_numpy(resized).permute(2, 0, 1)
    with torch.inference_mode():
        expected = model([planes], embeds, region, [image.shape[:2]]).sem_seg[0].argmax(0)
    np.testing.assert_array_equal(segmenter.segment(image), expected.numpy())
    with refused(ArgumentError, "protocol"):
        TorchSegmenter(model, SEVEN, embeds, region_embeds=region, protocol="slide")


def test_json_holds_everything_and_no_nan(scenes):
    scenes.seen = range(len(CLASS_NAMES))
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu", use_cache=False)) as engine:
        written = evaluate(EngineSegmenter(engine, CLASS_NAMES), scenes, limit=2).to_json()
    json.dumps(written, allow_nan=False)
    assert written["metrics_percent"]["mIoU(U)"] is None
    keys = {"kind", "name", "sha256", "protocol", "backend", "precision"}
    assert keys <= set(written["segmenter"])
    assert written["times"]["total_seconds"] >= written["times"]["segment_seconds"] > 0
    assert written["machine"]["zsseg_rt"]


def test_bad_requests_are_refused(scenes):
    class Broken(SceneDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return replace(sample, labels=sample.labels | 99) if index == 3 else sample

        def __len__(self):
            return 5 * (self.name == "scenes/val")

    oracle = Oracle(scenes)
    with refused(DatasetError, None, "000003", "0", "27"):
        evaluate(oracle, Broken("val"))
    with refused(ArgumentError, "limit"):
        evaluate(oracle, scenes, limit=0)
    with refused(DatasetError, None, "scenes/train"):
        evaluate(oracle, Broken("train"))
    oracle.class_names = CLASS_NAMES[:2]
    with refused(ArgumentError, "class_names"):
        evaluate(oracle, scenes)
    with refused(ArgumentError, "protocol"):
        TorchSegmenter(tiny.zegclip_model(), SEVEN, tiny.text_embeds(7, 32), protocol="crop")
    for order, argument, options in (
        ("rgb", "protocol", {"protocol": "slide"}),
        ("bgr", "engine", {}),
    ):
        config = EngineConfig(device="cpu", use_cache=False, channel_order=order)
        with Engine(Bundle.demo("scenes"), config) as engine, refused(ArgumentError, argument):
            EngineSegmenter(engine, CLASS_NAMES, **options)


# --- runs are evaluated like the bundles made of them ---


NAMES = ("sky", "grass, lawn", "road", "water")
PHRASES = ("sky", "grass", "lawn", "road", "water")


def save_run(folder, model, embeds, protocol="inductive", **changes):
    classes = {"names": NAMES, "seen": (0, 1), "phrases": PHRASES} | changes
    classes = TrainedClasses(
        **classes, templates=("a photo of a {}.",), space="tiny", protocol=protocol
    )
    card = describe_model(model, classes)
    parts = {"model": model.state_dict(), "constants": {"text_embeds": embeds}, "model_card": card}
    checkpoint = Checkpoint(step=1, num_processes=1, batch_size=1, **parts)
    CheckpointFolder(folder / "checkpoints").save(checkpoint)
    return folder


@pytest.fixture(scope="module")
def run(zegclip_model, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), zegclip_model, tiny.text_embeds(5, 32))


def test_a_run_and_its_bundle_label_alike(
    zegclip_model, zegclip_bundle, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    bundle, root = Bundle.load(zegclip_bundle), tmp_path / "data"
    for name in ("0.png", "1.png", "2.png"):
        photo(root / "images" / name, (90, 110), seed=int(name[0]))
        mask(root / "masks" / name, range(7), (90, 110))
    listing(root / "classes.txt", SEVEN)
    seen = tuple(map(SEVEN.index, bundle.head.seen))
    embeds = embed_phrases(zegclip_model.text_encoder, SEVEN, bundle.text.templates)
    run = save_run(tmp_path / "run", zegclip_model, embeds, names=SEVEN, phrases=SEVEN, seen=seen)
    data = ["--dataset", "folder", "--root", root, "--split", "all", "--device", "cpu"]
    written = []
    for model in ([run], [zegclip_bundle, "--precision", "float32"]):
        options = (*data, "--json", tmp_path / "report.json")
        assert command("evaluate", *model, *options) == 0, capsys.readouterr().err
        written.append(json.loads((tmp_path / "report.json").read_text()))
    assert [each["segmenter"]["kind"] for each in written] == ["torch", "bundle"]
    ours, theirs = (np.array(each["confusion"]) for each in written)
    assert (ours.sum(axis=0) > 0).sum() > 1
    assert abs(ours - theirs).sum() < 0.002 * ours.sum()  # float32 both
    for *option, message in (
        ("--precision", "float16", "float16"),
        ("--min-region-score", "0.1", "--min-region-score: expected None for the model"),
    ):
        assert command("evaluate", run, *data, *option) == 2
        assert message in capsys.readouterr().err


def test_seen_classes_are_lowered_only_where_some_were_unseen(run, zegclip_model, tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    embeds = tiny.text_embeds(5, 32)
    everywhere = save_run(tmp_path / "all", zegclip_model, embeds, protocol="supervised")
    shares = [
        np.isin(trained_segmenter(folder, NAMES, device="cpu").segment(image), (0, 1)).mean()
        for folder in (run, everywhere)
    ]
    assert shares[0] < shares[1]
    # new names come from the text tower
    names = ("sky", "meadow, lawn", "road", "water")
    plain, other = (trained_segmenter(run, n, device="cpu").text_embeds for n in (NAMES, names))
    assert not torch.equal(other[1], plain[1])
    assert torch.equal(other[2], plain[2])
    prompted = trained_segmenter(run, NAMES, templates=["the {}."], device="cpu").text_embeds
    assert not torch.isclose(prompted, plain).all(dim=1).any()


def test_what_a_run_cannot_label_is_refused(run, tmp_path):
    model = tiny.zegclip_model()
    model.config, model.text_encoder = replace(model.config, text_encoder=None), None
    bare = save_run(tmp_path / "bare", model, tiny.text_embeds(5, 32))
    trained_segmenter(bare, NAMES, device="cpu")
    with refused(VocabularyError, "class_names"):
        trained_segmenter(bare, ["meadow"], device="cpu")
    with refused(CheckpointError, None, tmp_path.name):
        trained_segmenter(tmp_path, NAMES)
    with refused(DeviceError, "device"):
        trained_segmenter(run, NAMES, device="cuda:99")


# --- papers' protocols: the lists are the published ones, and one command follows them ---

# First 16 hex digits of the SHA-256 of the official lists (SCLIP's and SC-CLIP's; SFP's).
HASHES = {
    "voc21": "80e643a9a1439668",
    "voc21, people": "3b5987c2d5028cff",
    "context60": "5e620446a8699f29",
    "coco-object": "3475d03d61f85ce0",
    "coco-stuff": "fb98709b9ab1baff",
    "cityscapes": "6f6782fc1bf92bfd",
    "cityscapes, people": "8dba4f1e3eeefc37",
    "ade20k": "e53ded02c488bdb9",
    "sclip on voc20": "c68f65a2b342397c",
    "sfp on voc20": "317dafe95650b39e",
    "sclip on context59": "cd808465f06a1616",
}


def test_names_are_the_published_lists():
    digests = {}
    for paper, dataset in itertools.product(papers(), PUBLISHED):
        try:
            rules = read_protocol(paper, dataset)
        except ArgumentError:
            continue
        end = " " if dataset == "context60" else ""  # the official file ends in a blank
        digest = hashlib.sha256(("\n".join(rules.classes) + end).encode()).hexdigest()[:16]
        shorter = dataset in ("voc20", "context59")
        digests[f"{paper} on {dataset}" if shorter else rules.names] = digest
    assert HASHES.items() <= digests.items()


@pytest.mark.nightly
def test_one_command_evaluates_as_a_paper_does(tmp_path, capsys):
    phrases = list(dict.fromkeys(", ".join(read_protocol("sclip", "voc21").classes).split(", ")))
    rows = np.random.default_rng(5).normal(size=(len(phrases), 3)).astype(np.float32)
    pool = helper.make_node(
        "AveragePool", ["image"], ["embeds"], kernel_shape=[16, 16], strides=[16, 16]
    )
    bundle = dense_bundle(
        tmp_path, [pool], (224, 224), (3, 14, 14), normalize=True, activation="softmax",
        logit_scale=30.0, text_bank=(phrases, rows / np.linalg.norm(rows, axis=1, keepdims=True)),
    )  # fmt: skip
    options = ["--dataset", "voc21", "--root", build_voc(tmp_path), "--partial"]
    options = [*map(str, [bundle, *options, "--json", tmp_path / "report.json"])]
    assert evaluate_as([*options, "--paper", "sclip", "--precision", "float32"]) == 0
    printed = capsys.readouterr().out
    for text in ("as published: sclip on voc21", "short side of 336", "scale 65, prob_thd 0.1",
                 "area_thd 0.1", "(56 phrases)", "no text encoder", "mIoU 59.63",
                 "differs: head: published with sclip; the bundle is"):  # fmt: skip
        assert text in printed
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["segmenter"]["as_published"]["followed"]["area_thd"] == 0.1
    assert evaluate_as([*options, "--paper", "naclip"]) == 1
    assert "export dense-clip --clip FILE --head naclip --size 336x448" in capsys.readouterr().err


# --- studies and tools that make what ships: a run of the least size of each ---

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
    root = Path(__file__).resolve().parents[2]
    report = measure_bundle(demo_bundle("scenes"), draws=[0], length=4, root=root)
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
