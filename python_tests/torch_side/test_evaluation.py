"""One way to evaluate torch models and bundles: figures, agreement, errors, no torch needed."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from support import tiny, tiny_zegformer
from support.colour_words import COLOUR_WORDS
from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig, cli
from zsseg_rt.errors import (
    ArgumentError,
    CheckpointError,
    DatasetError,
    DeviceError,
    ShapeError,
    VocabularyError,
)
from zsseg_rt.evaluation.datasets.base import Sample
from zsseg_rt.evaluation.evaluate import EngineSegmenter, evaluate
from zsseg_rt.evaluation.metrics import confusion_csv
from zsseg_rt.models.base import SlideSettings, slide_predict
from zsseg_rt.training.class_embeddings import embed_phrases
from zsseg_rt.training.loop.checkpointing import Checkpoint, CheckpointFolder
from zsseg_rt.training.trained import (
    TorchSegmenter,
    TrainedClasses,
    describe_model,
    trained_segmenter,
)

COLOURS = ("red", "green", "blue")


class Flags:
    name = "flags"
    class_names = COLOURS
    seen = (0, 1)
    ignore_label = 255

    def __init__(self, length=5):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        order = np.random.default_rng(index).permutation(3)
        colours = np.array([COLOUR_WORDS[name] for name in COLOURS], np.uint8)
        labels = np.repeat(order.astype(np.uint8)[None], 24, axis=0).repeat(16, axis=1)
        image = colours[labels]
        image[0, 0] = index  # no two pictures are equal
        labels[0] = 255
        return Sample(image=image, labels=labels, name=f"flag {index}")


class Oracle:
    """Knows the answer."""

    class_names = COLOURS

    def __init__(self, dataset):
        samples = [dataset[index] for index in range(len(dataset))]
        self.answers = {sample.image.tobytes(): sample.labels for sample in samples}

    def segment(self, image):
        labels = self.answers[image.tobytes()]
        return np.where(labels == 255, 0, labels).astype(np.uint8)

    def describe(self):
        return {"kind": "oracle"}


@pytest.fixture
def flags():
    return Flags()


def test_a_perfect_segmenter_scores_one_hundred(flags):
    result = evaluate(Oracle(flags), flags)
    assert set(result.scores.as_reported().values()) == {100.0}
    assert result.counts.sum() == 5 * 23 * 48  # the first row is not annotated
    assert result.pictures == result.dataset_size == 5


@pytest.mark.parametrize(("limit", "expected"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (9, None)])
def test_a_limit_spreads_over_the_set(flags, limit, expected):
    shown, read = [], []

    class Watched(Flags):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    oracle, count = Oracle(flags), len(expected) if expected else 5
    evaluate(oracle, Watched(), limit=limit, on_picture=lambda *pair: shown.append(pair))
    assert shown == [(done, count) for done in range(1, count + 1)]
    assert read == (expected or list(range(5)))


class NoisePictures(Flags):
    """Blurred noise, so that a random model gives many classes; labels are as random."""

    def __init__(self, num_classes, length=3):
        super().__init__(length)
        self.class_names = tuple(f"name {index}" for index in range(num_classes))
        self.seen = tuple(range(num_classes - 2))

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = cv2.resize(rng.integers(0, 256, (9, 11, 3), np.uint8), (110, 90))
        labels = rng.integers(0, len(self.class_names), (90, 110), np.uint8)
        return Sample(image=image, labels=labels, name=f"noise {index}")


@pytest.fixture(scope="module")
def small_zegclip():
    return tiny.zegclip_model(), tiny.text_embeds(7, 32)


def test_slide_is_the_official_protocol(small_zegclip):
    model, embeds = small_zegclip
    data = NoisePictures(7)
    names = data.class_names
    seen = [names[index] for index in model.config.seen_classes]
    windows = SlideSettings(short_side=96, crop_size=64, stride=53)
    segmenter = TorchSegmenter(
        model, names, embeds, seen_names=seen, protocol="slide", windows=windows
    )
    image = data[0].image
    expected = slide_predict(model, image, embeds, short_side=96, crop_size=64, stride=53)
    np.testing.assert_array_equal(segmenter.segment(image), expected.argmax(0).numpy())
    assert len(np.unique(expected.argmax(0))) > 1
    usual = TorchSegmenter(model, names, embeds, protocol="slide").describe()["windows"]
    assert usual == {"short_side": 64, "crop_size": 64, "stride": 53}  # as the official ones


def test_the_best_synonym_counts(small_zegclip):
    model, embeds = small_zegclip
    image = NoisePictures(7)[0].image
    plain = TorchSegmenter(model, [f"name {i}" for i in range(7)], embeds).segment(image)
    merged = TorchSegmenter(model, ["a, b, c", "d", "e, f", "g"], embeds).segment(image)
    np.testing.assert_array_equal(merged, np.array([0, 0, 0, 1, 2, 2, 3])[plain])


def test_zegformer_is_resized_and_labelled_as_officially():
    model = tiny_zegformer.model()
    embeds, region = (tiny_zegformer.text_features(salt) for salt in "ab")
    names, image = NoisePictures(7).class_names, NoisePictures(7)[0].image
    model.config = replace(model.config, image_size=64)
    segmenter = TorchSegmenter(model, names, embeds, region_embeds=region, seen_names=names[:5])
    resized = np.array(Image.fromarray(image).resize((78, 64), Image.Resampling.BILINEAR))
    planes = torch.from_numpy(resized).permute(2, 0, 1)
    with torch.inference_mode():
        expected = model([planes], embeds, region, [image.shape[:2]]).sem_seg[0].argmax(0)
    np.testing.assert_array_equal(segmenter.segment(image), expected.numpy())
    with refused(ArgumentError, "protocol"):
        TorchSegmenter(model, names, embeds, region_embeds=region, protocol="slide")


def test_json_holds_everything_and_no_nan(colour_bundle, flags):
    flags.seen = (0, 1, 2)
    with Engine(colour_bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        written = evaluate(EngineSegmenter(engine, COLOURS), flags, limit=2).to_json()
    json.dumps(written, allow_nan=False)
    assert written["metrics_percent"]["mIoU(U)"] is None
    keys = {"kind", "name", "sha256", "protocol", "backend", "precision"}
    assert keys <= set(written["segmenter"])
    assert written["times"]["total_seconds"] >= written["times"]["segment_seconds"] > 0
    assert written["machine"]["zsseg_rt"]


def test_bad_requests_are_refused(flags, small_zegclip, colour_bundle):
    class Broken(Flags):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            if index == 3:
                sample.labels[7, 7] = 9
            return sample

    oracle = Oracle(flags)
    with refused(DatasetError, None, "3", "0", "2"):
        evaluate(oracle, Broken())
    with refused(ArgumentError, "limit"):
        evaluate(oracle, flags, limit=0)
    with refused(DatasetError, "flags"):
        evaluate(oracle, Flags(0))
    oracle.class_names = COLOURS[:2]
    with refused(ArgumentError, "class_names"):
        evaluate(oracle, flags)
    model, embeds = small_zegclip
    with refused(ArgumentError, "protocol"):
        TorchSegmenter(model, ["a"] * 7, embeds, protocol="crop")
    for order, argument, options in (
        ("rgb", "protocol", {"protocol": "slide"}),
        ("bgr", "engine", {}),
    ):
        config = EngineConfig(device="cpu", use_cache=False, channel_order=order)
        with Engine(colour_bundle, config) as engine, refused(ArgumentError, argument):
            EngineSegmenter(engine, COLOURS, **options)


def test_a_confusion_matrix_as_csv():
    counts = np.array([[3, 1, 0], [0, 5, 2]])
    text = confusion_csv(counts, ["a, b", "ä"])
    assert text.splitlines() == ['true class,"a, b",ä,(unknown)', '"a, b",3,1,0', "ä,0,5,2"]
    with refused(ShapeError, "counts"):
        confusion_csv(counts, ["a"])


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
    bundle, noise, root = Bundle.load(zegclip_bundle), NoisePictures(7), tmp_path / "data"
    names = noise.class_names
    for kind, part in (("images", "image"), ("masks", "labels")):
        (root / kind).mkdir(parents=True)
        for index in range(3):
            cv2.imwrite(str(root / kind / f"{index}.png"), getattr(noise[index], part))
    (root / "classes.txt").write_text("\n".join(names))
    seen = tuple(names.index(name) for name in bundle.head.seen)
    embeds = embed_phrases(zegclip_model.text_encoder, names, bundle.text.templates)
    run = save_run(tmp_path / "run", zegclip_model, embeds, names=names, phrases=names, seen=seen)
    data = ["--dataset", "folder", "--root", root, "--split", "all", "--device", "cpu"]
    written = []
    for model in ([run], [zegclip_bundle, "--precision", "float32"]):
        arguments = [*model, *data, "--json", tmp_path / "report.json"]
        assert cli.main(["evaluate", *map(str, arguments)]) == 0, capsys.readouterr().err
        written.append(json.loads((tmp_path / "report.json").read_text()))
    assert [each["segmenter"]["kind"] for each in written] == ["torch", "bundle"]
    ours, theirs = (np.array(each["confusion"]) for each in written)
    assert (ours.sum(axis=0) > 0).sum() > 1
    assert abs(ours - theirs).sum() < 0.002 * ours.sum()  # float32 both
    arguments = [run, *data]
    assert cli.main(["evaluate", *map(str, arguments), "--precision", "float16"]) == 2
    assert "float16" in capsys.readouterr().err
    assert cli.main(["evaluate", *map(str, arguments), "--min-region-score", "0.1"]) == 2
    assert "--min-region-score: expected None for the model" in capsys.readouterr().err


def test_seen_classes_are_lowered_only_where_some_were_unseen(run, zegclip_model, tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    embeds = tiny.text_embeds(5, 32)
    everywhere = save_run(tmp_path / "all", zegclip_model, embeds, protocol="supervised")
    shares = [
        np.isin(trained_segmenter(folder, NAMES, device="cpu").segment(image), (0, 1)).mean()
        for folder in (run, everywhere)
    ]
    assert shares[0] < shares[1]


def test_new_names_come_from_the_text_tower(run):
    plain = trained_segmenter(run, NAMES, device="cpu")
    other = trained_segmenter(run, ("sky", "meadow, lawn", "road", "water"), device="cpu")
    assert not torch.equal(other.text_embeds[1], plain.text_embeds[1])
    assert torch.equal(other.text_embeds[2], plain.text_embeds[2])
    prompted = trained_segmenter(run, NAMES, templates=["the {}."], device="cpu")
    assert not torch.isclose(prompted.text_embeds, plain.text_embeds).all(dim=1).any()


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
