"""Bundles of ZegCLIP, CLIP-RC, ZeroSeg and CAT-Seg label as their models in torch."""

import itertools
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from support import golden_cat_seg as rule
from support import tiny
from support.command_line import run
from support.descriptor_models import assert_labels_are_the_models, make_inputs, torch_scores
from support.errors import refused
from support.fakes import edit_manifest
from support.frame_kinds import STORED, frame
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.backends import registry
from zsseg_rt.backends._openvino import process_core
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import SegmentSpec
from zsseg_rt.errors import (
    ArgumentError,
    BundleError,
    CheckpointError,
    ConfigError,
    VocabularyError,
)
from zsseg_rt.export import export_bundle
from zsseg_rt.export.architectures.zeroseg import export_zeroseg
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.models import create_model
from zsseg_rt.models.base import SlideSettings
from zsseg_rt.models.cat_seg.model import CatSeg
from zsseg_rt.ops import reference
from zsseg_rt.runtime.families import aggregation
from zsseg_rt.text.tokenizer import Tokenizer
from zsseg_rt.training.trained import TorchSegmenter

pytestmark = pytest.mark.usefixtures("without_gradients")
NAMES = [f"name {index}" for index in range(7)]
CPU = {"device": "cpu", "precision": "float32", "use_cache": False}
TEXTLESS = {"precisions": ("float32",), "text_encoder": None, "verify": False}


def embed_prompts(model, path, prompts):
    """A model's unit rows for texts, as a bundle's tokenizer cuts them."""
    tokens = Tokenizer(path / "tokenizer.json", context_length=77).encode(prompts)
    return F.normalize(model.text_encoder(torch.from_numpy(tokens)), dim=-1)


# --- ZegCLIP and CLIP-RC --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_rc(tmp_path_factory):
    model, folder = tiny.clip_rc_model(), tmp_path_factory.mktemp("clip_rc")
    options = {"class_names": NAMES, "text_encoder": None}
    return model, export_bundle(model, folder / "tiny.zsseg", **options)


@pytest.mark.parametrize(("backend", "count"), [("openvino", 1), ("openvino", 19), ("torch", 7)])
def test_a_descriptors_engine_equals_torch(clip_rc, backend, count):
    image, embeds = make_inputs(count, seed=count)
    names = [f"name {index}" for index in range(count)]
    with Engine(clip_rc[1], EngineConfig(**CPU, backend=backend)) as engine:
        engine.set_classes(names, embeddings=embeds)
        labels = engine.segment(image).labels
    assert_labels_are_the_models(labels, torch_scores(clip_rc[0], image, embeds))


def test_seen_bias_follows_names_not_places(zegclip_bundle):
    image, embeds = make_inputs(7)
    order = np.array([6, 2, 0, 5, 1, 4, 3])
    with Engine(zegclip_bundle, EngineConfig(**CPU)) as engine:
        engine.set_classes(NAMES, embeddings=embeds)
        straight = engine.segment(image).labels
        engine.set_classes([NAMES[i] for i in order], embeddings=embeds[order])
        shuffled = engine.segment(image).labels
    assert (order[shuffled] == straight).mean() > 0.999


def test_text_encoder_gives_the_embeddings_and_is_freed_on_request(zegclip_model, zegclip_bundle):
    with Engine(zegclip_bundle, EngineConfig(**CPU, keep_text_encoder=False)) as engine:
        vocabulary = engine.set_classes(["a dog", "the road"], templates=["{}", "see {}."])
        assert engine._maker._embedder._session is None
        prompts = ["a dog", "see a dog.", "the road", "see the road."]
        rows = embed_prompts(zegclip_model, zegclip_bundle, prompts)
        expected = F.normalize(rows.reshape(2, 2, -1).mean(1), dim=-1)
        np.testing.assert_allclose(vocabulary.embeds, expected.numpy(), atol=2e-6)
        assert engine.segment(frame()).names == ("a dog", "the road")
        again = engine.set_classes(["a cat", "a dog"], templates=["{}", "see {}."]).embeds
        np.testing.assert_array_equal(again[1], vocabulary.embeds[0])


@pytest.mark.parametrize("settings", [{"channel_order": "bgr"}, {"unknown_below": 0.9}])
def test_self_check_does_not_depend_on_the_engines_settings(zegclip_bundle, settings):
    with Engine(zegclip_bundle, EngineConfig(**CPU, **settings)) as engine:
        report = engine.self_check()
    assert report.passed, report.first_failure


# --- ZeroSeg --------------------------------------------------------------------------------------

SIZE_HW = (64, 96)
HEADS = {"num_heads": 4, "head_heads": 4, "decoder_heads": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_file(zeroseg_model().state_dict(), path)
    return path


def build(checkpoint, clip_file=None, **config):
    text = {"text_heads": 4, "activation": "quick_gelu", "pretrained": clip_file}
    options = HEADS | {"image_size": SIZE_HW} | (text if clip_file else {}) | config
    return create_model("zeroseg", weights=checkpoint, **options)


@pytest.fixture(scope="module")
def zeroseg(checkpoint, clip_file, tmp_path_factory):
    model = build(checkpoint, clip_file)
    path = tmp_path_factory.mktemp("bundles") / "student.zsseg"
    return model, export_bundle(model, path, verify=False)


@pytest.fixture(scope="module")
def engine(zeroseg):
    with Engine(zeroseg[1], EngineConfig(**CPU, with_scores=True)) as engine:
        yield engine


def blocks(height, width):
    image = np.random.default_rng(3).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    image = image.repeat(-(-height // 5), 0).repeat(-(-width // 6), 1)
    return np.ascontiguousarray(image[:height, :width])


def torch_labels(model, image, embeds):
    """Labels, scores, and where the best two shares of segments are clearly apart."""
    planes = reference.preprocess(
        image, size_hw=model.config.size_hw, mean=model.image_mean, std=model.image_std
    )
    tensor = torch.from_numpy(planes[None])
    labels, scores = model.segment(tensor, torch.tensor(embeds), image.shape[:2])
    shares = model(tensor).group_map.numpy()
    top = np.sort(reference.upsample_bilinear(shares, image.shape[:2])[0], axis=0)
    return labels[0].numpy(), scores[0].numpy(), top[-1] - top[-2] > 1e-5


def assert_same_result(seg, model, image, embeds):
    labels, scores, clear = torch_labels(model, image, embeds)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(seg.labels[clear], np.where(labels < 0, 255, labels)[clear])
    np.testing.assert_allclose(seg.scores[clear], scores[clear], atol=2e-4)
    return seg.labels


def test_zerosegs_engine_equals_torch(zeroseg, engine):
    embeds = tiny.text_embeds(7, 32).numpy()
    config = EngineConfig(**CPU, backend="torch", with_scores=True)
    with Engine(zeroseg[1], config) as in_torch:
        for each, size_hw in itertools.product((engine, in_torch), ((37, 53), (130, 200))):
            image = blocks(*size_hw)
            each.set_classes(NAMES, embeddings=embeds)
            labels = assert_same_result(each.segment(image), zeroseg[0], image, embeds)
            assert len(np.unique(labels)) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"background_threshold": 1.0},
        {"background_threshold": 0.7, "logit_scale": 20.0},
        {"top_k": None, "logit_scale": 30.0},
    ],
)
def test_class_rule_reaches_the_engine(zeroseg, checkpoint, tmp_path, options):
    """The rule is written to the manifest and the engine keeps to it; the graph is the same."""
    model = build(checkpoint, **options)
    written = export_zeroseg(model, ExportOptions())
    path = shutil.copytree(zeroseg[1], tmp_path / "a.zsseg")
    edit_manifest(path, ("head",), written.head)
    edit_manifest(path, ("segments",), written.sections["segments"])
    image, embeds = blocks(64, 96), tiny.text_embeds(9, 32).numpy()
    with Engine(path, EngineConfig(**CPU, with_scores=True)) as engine:
        engine.set_classes([f"n{i}" for i in range(9)], embeddings=embeds)
        seg = engine.segment(image)
    labels = assert_same_result(seg, model, image, embeds)
    assert {*np.unique(labels)} > {255} or options.get("background_threshold") != 1.0


def test_auto_is_float32_for_hard_groups(zeroseg, zegclip_bundle):
    usual = registry.get_backend("openvino").choose(
        ("float32",), "auto", device="cpu", allowed=("float16", "bfloat16", "float32")
    )
    for path, precision in ((zeroseg[1], "float32"), (zegclip_bundle, usual.precision)):
        with Engine(path, EngineConfig(**(CPU | {"precision": "auto"}))) as engine:
            assert engine.precision == precision


def test_synonyms_and_background_compete_as_phrases(engine):
    rows, image = tiny.text_embeds(6, 32).numpy(), blocks(64, 96)
    engine.set_classes([f"p{i}" for i in range(6)], embeddings=rows)
    plain = engine.segment(image).labels
    engine.set_classes([["p0", "p1"], ["p2", "p3", "p4"]], embeddings=rows, background=["p5"])
    grouped = engine.segment(image).labels
    np.testing.assert_array_equal(grouped, np.array([0, 0, 1, 1, 1, 255])[plain])
    assert len(np.unique(plain)) > 1


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_evaluation_labels_as_the_engine_and_as_the_paper(engine, checkpoint, threshold):
    model = build(checkpoint, background_threshold=threshold)
    image, embeds = blocks(64, 96), tiny.text_embeds(7, 32)
    whole = TorchSegmenter(model, NAMES, embeds)
    engine.set_classes(NAMES, embeddings=embeds.numpy())
    expected = engine.segment(image, unknown_below=threshold).labels
    clear = torch_labels(model, image, embeds.numpy())[2]
    np.testing.assert_array_equal(whole.segment(image)[clear], expected[clear])
    assert whole.describe()["architecture"] == "zeroseg"
    windows = SlideSettings(short_side=64, crop_size=64, stride=32)
    slide = TorchSegmenter(model, NAMES, embeds, protocol="slide", windows=windows)
    labels = model.slide(image, embeds, windows).numpy()
    np.testing.assert_array_equal(slide.segment(image), np.where(labels < 0, 255, labels))


def test_text_tower_of_another_teacher_is_refused(checkpoint, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(tiny.clip_state_dict(tiny.TinySizes(embed_dim=48)), path)
    with refused(CheckpointError, "pretrained", "32", "48"):
        build(checkpoint, path)


def test_the_command_exports_zeroseg(zeroseg, checkpoint, clip_file, tmp_path, capsys):
    bundle = Bundle.load(zeroseg[1])
    assert bundle.segments == SegmentSpec(num_segments=4, top_k=5, plain_cosine=False)
    assert (bundle.head.unknown_below, bundle.text.templates) == (None, ("a photo of a {}.",))
    graph = onnx.load(bundle.path / bundle.graphs["image_encoder"]["float32"].file).graph
    assert not any("decoder" in tensor.name for tensor in graph.initializer)
    names, rows, out = tmp_path / "n.txt", tmp_path / "r.npy", tmp_path / "c.zsseg"
    names.write_text("cat\nroad\n")
    embeds = tiny.text_embeds(2, 32).numpy()
    np.save(rows, embeds)
    command = ("export", "zeroseg", checkpoint, "--num-heads", 4, "--head-heads", 4, "--out")
    code = run(
        *(*command, out, "--size", "64x96", "--text", clip_file, "--text-heads", 4),
        *("--text-activation", "quick_gelu", "--unknown-below", 0.35, "--top-k", 0),
        *("--precision", "float32", "--template", "a {}.", "--bank", names, rows),
    )
    assert code == 0, capsys.readouterr().err
    bundle = Bundle.load(out)
    assert bundle.head.unknown_below == 0.35
    assert bundle.segments == SegmentSpec(num_segments=4, top_k=None)
    assert bundle.text.templates == ("a {}.",)
    assert bundle.provenance["source"] == "student.safetensors"
    with Engine(out, EngineConfig(**CPU)) as engine:
        assert engine.self_check().passed
        new_rows = engine.set_classes(["road", "cat"]).embeds
    np.testing.assert_array_equal(new_rows, embeds[::-1])
    for arguments, code, message in (
        (("--text-activation", "relu"), 2, "--text-activation: expected quick_gelu or gelu"),
        (("--unknown-below", 3), 1, "background_threshold"),
    ):
        assert run(*command, tmp_path / "d.zsseg", *arguments) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "d.zsseg").exists()


# --- CAT-Seg --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = rule.tiny_model(most_classes=8)  # of more, the head is shown the best
    path = tmp_path_factory.mktemp("cat_seg") / "tiny.zsseg"
    return model, export_bundle(model, path, precisions=("float32",))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """As officially of more than 256 names the head is shown 256, in parts of 32."""
    model = rule.tiny_model(padding=256)
    path = tmp_path_factory.mktemp("cat_seg_wide") / "wide.zsseg"
    return model, export_bundle(model, path, **TEXTLESS)


@pytest.fixture(scope="module")
def older(wide, tmp_path_factory):
    """The same bundle without the head's parts, as earlier versions wrote them."""
    path = shutil.copytree(wide[1], tmp_path_factory.mktemp("older") / "older.zsseg")
    for stage in aggregation.STAGES:
        edit_manifest(path, ("graphs", stage), ...)
    return wide[0], path


@pytest.fixture(scope="module")
def scores_of():
    """Every class's score on the grid, and the labels; an engine serves all vocabularies."""
    with ExitStack() as stack:

        @cache
        def engine_of(path, settings):
            config = EngineConfig(**(CPU | dict(settings)), with_class_scores="low")
            return stack.enter_context(Engine(path, config))

        def scores_of(path, image, embeds, **settings):
            engine = engine_of(path, tuple(settings.items()))
            engine.set_classes([f"c{i}" for i in range(len(embeds))], embeddings=embeds)
            seg = engine.segment(image)
            return seg.class_scores, seg.labels

        yield scores_of


def model_logits(model, image, embeds):
    statistics = {"mean": model.image_mean, "std": model.image_std}
    planes = torch.from_numpy(reference.preprocess(image, size_hw=(96, 96), **statistics)[None])
    return model(planes, torch.from_numpy(np.asarray(embeds, np.float32))).mask_logits


def log_odds(scores):
    scores = scores.astype(np.float64)
    return np.log(scores) - np.log1p(-scores)


@pytest.mark.parametrize(
    ("bundle", "settings", "counts"),
    [
        ("exported", {}, (1, 8, 9)),
        ("wide", {}, (5, 33, 256, 257)),
        ("older", {}, (33, 300)),
        ("wide", {"head_classes": "all"}, (3, 300)),
    ],
)
def test_engine_gives_cat_segs_scores(request, scores_of, bundle, settings, counts):
    """All classes: exact, but not what the model was trained with."""
    model, path = request.getfixturevalue(bundle)
    if settings:
        model = rule.tiny_model(padding=256, most_classes=None)
    for count in counts:
        image, embeds = make_inputs(count, seed=count)
        scores, labels = scores_of(path, image, 3 * embeds, **settings)
        logits = model_logits(model, image, embeds)
        np.testing.assert_allclose(scores, logits[0].sigmoid(), atol=1e-5)
        shown = scores > 0
        assert shown.all(axis=(1, 2)).sum() == min(count, model.config.most_classes or count)
        np.testing.assert_allclose(log_odds(scores[shown]), logits[0][shown], atol=1e-4)
        up = F.interpolate(logits, image.shape[:2], mode="bilinear")
        assert_labels_are_the_models(labels, up[0].sigmoid().numpy())


@pytest.mark.parametrize(
    ("backend", "precision", "atol"),
    [("torch", "float32", 1e-5), ("torch", "bfloat16", 0.03), ("openvino", "bfloat16", 0.03)],
)
def test_backends_and_precisions_agree(wide, scores_of, backend, precision, atol):
    able = process_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if backend == "openvino" and "BF16" not in able:
        pytest.skip("this CPU has no bfloat16")
    image, embeds = make_inputs(40)
    scores, _ = scores_of(wide[1], image, embeds, backend=backend, precision=precision)
    np.testing.assert_allclose(scores, scores_of(wide[1], image, embeds)[0], atol=atol)


def test_a_model_of_all_classes_makes_a_bundle_of_all(scores_of, tmp_path):
    model = rule.tiny_model(most_classes=None)
    path = export_bundle(model, tmp_path / "all.zsseg", **TEXTLESS)
    assert Bundle.load(path).aggregation.most is None
    image, embeds = make_inputs(40)
    scores, _ = scores_of(path, image, embeds)
    np.testing.assert_allclose(log_odds(scores), model_logits(model, image, embeds)[0], atol=1e-4)
    best, _ = scores_of(path, image, embeds, head_classes="best")
    assert (best > 0).all(axis=(1, 2)).sum() == model.config.aggregator.padding


def test_only_this_family_has_such_a_head(exported, tmp_path):
    with refused(ConfigError, "head_classes"):
        EngineConfig(head_classes="some")
    with refused(ArgumentError, "head_classes"):
        Engine(Bundle.demo("scenes"), EngineConfig(**CPU, head_classes="all"))
    with Engine(exported[1], EngineConfig(**CPU, head_classes="all")) as engine:
        for count in (0, 1025, 10_000):
            with refused(VocabularyError, "class_names"):
                engine.set_classes([f"c{i}" for i in range(count)])
    with refused(ArgumentError, "windows"):
        Engine(exported[1], EngineConfig(**CPU, windows="auto"))
    for argument, value in (
        ("size_hw", (128, 128)),
        ("text_encoder", exported[0].text_encoder),
        ("space", "OpenAI CLIP ViT-B/16"),
    ):
        with refused(ArgumentError, argument):
            export_bundle(exported[0], tmp_path / "a.zsseg", **{argument: value})
    assert not list(tmp_path.iterdir())


def test_a_part_is_a_share_of_the_vocabulary(wide, monkeypatch):
    """So is what is in memory at once; and no vocabulary compiles anything."""
    loaded, sizes, run = [], [], aggregation.AggregationPipeline.run_stage
    backend = registry.get_backend("openvino")
    load_graph = type(backend).load
    monkeypatch.setattr(
        type(backend), "load", lambda *a, **k: (loaded.append(a), load_graph(*a, **k))[1]
    )

    def noting(parts, stage, feeds):
        sizes.append((stage, len(feeds["class_halves"])))
        return run(parts, stage, feeds)

    monkeypatch.setattr(aggregation.AggregationPipeline, "run_stage", noting)
    with Engine(wide[1], EngineConfig(**CPU)) as engine:
        num_loaded = len(loaded)
        for count, expected in ((32, []), (33, [17, 16]), (150, [30] * 5), (257, [32] * 8)):
            image, embeds = make_inputs(count)
            engine.set_classes([f"c{i}" for i in range(count)], embeddings=embeds)
            sizes.clear()
            engine.segment(image)
            assert sizes == [(stage, size) for stage in range(3) for size in expected]
        assert len(loaded) == num_loaded == 5


def test_names_are_embedded_by_the_tuned_tower_alone(exported):
    model, path = exported
    text = Bundle.load(path).text
    assert text.templates == ("A photo of a {} in the scene",)
    with Engine(path, EngineConfig(**CPU)) as engine:
        assert engine.self_check().passed
        own = engine.set_classes(["cat", "traffic light"])
        assert own.space == CatSeg.text_space == text.space
        with refused(VocabularyError, "class_names"):
            engine.set_classes(replace(own, space="OpenAI CLIP ViT-B/16"))
        engine.set_classes(own)
        engine.set_classes(replace(own, space=""))
        assert engine.set_classes(["red", "blue"], embeddings=own.embeds).space == ""
    prompts = [text.templates[0].replace("{}", name) for name in own.names]
    np.testing.assert_allclose(own.embeds, embed_prompts(model, path, prompts), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "keys", "value", "message"),
    [
        ("aggregation", ("aggregation",), ..., "aggregation"),
        ("segment_tokens", ("segments",), ..., "missing key 'segments'"),
        ("segment_tokens", ("segments", "top_k"), 0, "top_k: expected at least 1"),
        ("segment_tokens", ("segments", "num_segments"), 255, "num_segments: expected from 1 to"),
        ("proposals", ("regions",), None, "missing key 'regions'"),
        ("proposals", ("regions", "fusion"), "mean", "fusion: expected one of"),
        ("proposals", ("regions", "encoder", "style"), "box", "style: expected one of"),
        ("proposals", ("regions", "encoder", "batch"), 65, "batch: expected from 1 to 64"),
        ("proposals", ("regions", "encoder", "templates"), ["none"], "templates: expected one"),
        ("proposals", ("regions", "encoder"), None, "one unless fusion is 'segments'"),
        ("proposals", ("graphs", "region_encoder"), {}, "missing key 'region_encoder'"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path, family, keys, value, message):
    path = shutil.copytree(STORED / f"{family}.zsseg", tmp_path / "copy.zsseg")
    edit_manifest(path, keys, value)
    with pytest.raises(BundleError, match=message):
        Bundle.load(path)
