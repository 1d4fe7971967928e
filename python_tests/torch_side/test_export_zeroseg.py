"""ZeroSeg as a bundle: graph, golden sample, engine and command line against torch."""

import itertools
import shutil

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from support import tiny
from support.command_line import run
from support.errors import refused
from support.fakes import edit_manifest
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.backends import registry
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import SegmentSpec
from zsseg_rt.errors import BundleError, CheckpointError
from zsseg_rt.export import export_bundle
from zsseg_rt.export.architectures.zeroseg import export_zeroseg
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.models import create_model
from zsseg_rt.models.base import SlideSettings
from zsseg_rt.ops import reference

SIZE_HW = (64, 96)
NAMES = [f"name {index}" for index in range(7)]
CPU = {"device": "cpu", "backend": "openvino", "precision": "float32", "use_cache": False}
TEXT_SIZES = tiny.TinySizes(text_vocab=49408, text_length=77)
HEADS = {"num_heads": 4, "head_heads": 4, "decoder_heads": 4}


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """The tiny teacher's file in OpenAI's layout."""
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(tiny.clip_state_dict(TEXT_SIZES), path)
    return path


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
def exported(checkpoint, clip_file, tmp_path_factory):
    model = build(checkpoint, clip_file)
    path = tmp_path_factory.mktemp("bundles") / "student.zsseg"
    return model, export_bundle(model, path, verify=False)


def frame_of(*size_hw, seed=3):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    rows, columns = -(-size_hw[0] // 5), -(-size_hw[1] // 6)
    big = blocks.repeat(rows, 0).repeat(columns, 1)[: size_hw[0], : size_hw[1]]
    return np.ascontiguousarray(big)


def torch_labels(model, frame, embeds):
    """Labels, scores, and where the best two shares of segments are clearly apart."""
    image = reference.preprocess(
        frame, size_hw=model.config.size_hw, mean=model.image_mean, std=model.image_std
    )
    tensor = torch.from_numpy(image[None])
    labels, scores = model.segment(tensor, torch.tensor(embeds), frame.shape[:2])
    with torch.no_grad():
        shares = model(tensor).group_map.numpy()
    top = np.sort(reference.upsample_bilinear(shares, frame.shape[:2])[0], axis=0)
    return labels[0].numpy(), scores[0].numpy(), top[-1] - top[-2] > 1e-5


def test_bundle_states_the_class_rule_and_the_teachers_words(exported):
    bundle = Bundle.load(exported[1])
    assert (bundle.preprocess.size_hw, bundle.head.grid_hw) == (SIZE_HW, (4, 6))
    assert bundle.head.unknown_below is None
    assert bundle.segments == SegmentSpec(num_segments=4, top_k=5, plain_cosine=False)
    assert bundle.text.embed_dim == 32
    assert bundle.text.templates == ("a photo of a {}.",)
    assert set(bundle.graphs) == {"image_encoder", "text_encoder"}
    graph = onnx.load(bundle.path / bundle.graphs["image_encoder"]["float32"].file).graph
    assert not any("decoder" in tensor.name for tensor in graph.initializer)


@pytest.fixture(scope="module")
def engine(exported):
    with Engine(exported[1], EngineConfig(**CPU, with_scores=True)) as engine:
        yield engine


def test_engine_equals_torch(exported, engine):
    embeds = tiny.text_embeds(7, 32).numpy()
    other = EngineConfig(**(CPU | {"backend": "torch"}), with_scores=True)
    with Engine(exported[1], other) as in_torch:
        for each, size_hw in itertools.product((engine, in_torch), ((37, 53), (130, 200))):
            frame = frame_of(*size_hw)
            each.set_classes(NAMES, embeddings=embeds)
            seg = each.segment(frame)
            labels, scores, clear = torch_labels(exported[0], frame, embeds)
            assert clear.mean() > 0.99
            np.testing.assert_array_equal(seg.labels[clear], labels[clear])
            np.testing.assert_allclose(seg.scores[clear], scores[clear], atol=2e-4)
            assert len(np.unique(seg.labels)) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"background_threshold": 1.0},
        {"background_threshold": 0.7, "logit_scale": 20.0},
        {"top_k": None, "logit_scale": 30.0},
    ],
    ids=str,
)
def test_class_rule_reaches_the_engine(exported, checkpoint, tmp_path, options):
    """The rule is written to the manifest and the engine keeps to it; the graph is the same."""
    model = build(checkpoint, **options)
    path, written = tmp_path / "a.zsseg", export_zeroseg(model, ExportOptions())
    shutil.copytree(exported[1], path)
    edit_manifest(path, ("head",), written.head)
    edit_manifest(path, ("segments",), written.sections["segments"])
    frame, embeds = frame_of(64, 96), tiny.text_embeds(9, 32).numpy()
    with Engine(path, EngineConfig(**CPU, with_scores=True)) as engine:
        engine.set_classes([f"n{i}" for i in range(9)], embeddings=embeds)
        seg = engine.segment(frame)
    labels, scores, clear = torch_labels(model, frame, embeds)
    expected = np.where(labels < 0, 255, labels)
    np.testing.assert_array_equal(seg.labels[clear], expected[clear])
    np.testing.assert_allclose(seg.scores[clear], scores[clear], atol=2e-4)
    if options.get("background_threshold") == 1.0:
        assert (labels == -1).any()
        assert (labels >= 0).any()


def test_auto_is_float32_for_hard_groups(exported, zegclip_bundle):
    usual = registry.get_backend("openvino").choose(
        ("float32",), "auto", device="cpu", allowed=("float16", "bfloat16", "float32")
    )
    for path, precision in ((exported[1], "float32"), (zegclip_bundle, usual.precision)):
        with Engine(path, EngineConfig(**(CPU | {"precision": "auto"}))) as engine:
            assert engine.precision == precision


def test_synonyms_and_background_compete_as_phrases(engine):
    rows, frame = tiny.text_embeds(6, 32).numpy(), frame_of(64, 96)
    engine.set_classes([f"p{i}" for i in range(6)], embeddings=rows)
    plain = engine.segment(frame).labels
    engine.set_classes([["p0", "p1"], ["p2", "p3", "p4"]], embeddings=rows, background=["p5"])
    grouped = engine.segment(frame).labels
    table = np.array([0, 0, 1, 1, 1, 255])
    np.testing.assert_array_equal(grouped, table[plain])
    assert len(np.unique(plain)) > 1


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_evaluation_labels_as_the_engine_and_as_the_paper(engine, checkpoint, threshold):
    from zsseg_rt.training.trained import TorchSegmenter

    model = build(checkpoint, background_threshold=threshold)
    frame, embeds = frame_of(64, 96), tiny.text_embeds(7, 32)
    whole = TorchSegmenter(model, NAMES, embeds)
    engine.set_classes(NAMES, embeddings=embeds.numpy())
    expected = engine.segment(frame, unknown_below=threshold).labels
    clear = torch_labels(model, frame, embeds.numpy())[2]
    np.testing.assert_array_equal(whole.segment(frame)[clear], expected[clear])
    assert whole.describe()["architecture"] == "zeroseg"
    windows = SlideSettings(short_side=64, crop_size=64, stride=32)
    slide = TorchSegmenter(model, NAMES, embeds, protocol="slide", windows=windows)
    labels = model.slide(frame, embeds, windows).numpy()
    np.testing.assert_array_equal(slide.segment(frame), np.where(labels < 0, 255, labels))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("segments",), ..., "missing key 'segments'"),
        (("segments", "top_k"), 0, "top_k: expected at least 1"),
        (("segments", "num_segments"), 255, "num_segments: expected from 1 to 254"),
    ],
)
def test_damaged_manifests_are_refused(exported, tmp_path, keys, value, message):
    path = tmp_path / "a.zsseg"
    path.mkdir()
    shutil.copy(exported[1] / "bundle.json", path)
    edit_manifest(path, keys, value)
    with pytest.raises(BundleError, match=message):
        Bundle.load(path)


def test_text_tower_of_another_teacher_is_refused(checkpoint, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(tiny.clip_state_dict(tiny.TinySizes(embed_dim=48)), path)
    with refused(CheckpointError, "pretrained", "32", "48"):
        build(checkpoint, path)


def test_command_line(checkpoint, clip_file, tmp_path, capsys):
    names, rows, out = tmp_path / "n.txt", tmp_path / "r.npy", tmp_path / "c.zsseg"
    names.write_text("cat\nroad\n")
    embeds = tiny.text_embeds(2, 32).numpy()
    np.save(rows, embeds)
    code = run(
        *("export", "zeroseg", checkpoint, "--out", out, "--size", "64x96"),
        *("--num-heads", 4, "--head-heads", 4, "--text", clip_file, "--text-heads", 4),
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


def test_command_line_refusals(checkpoint, tmp_path, capsys):
    heads = ("--num-heads", 4, "--head-heads", 4)
    for arguments, code, message in (
        (("--text-activation", "relu"), 2, "--text-activation: expected quick_gelu or gelu"),
        ((*heads, "--unknown-below", 3), 1, "background_threshold"),
    ):
        asked = ("export", "zeroseg", checkpoint, "--out", tmp_path / "c.zsseg", *arguments)
        assert run(*asked) == code
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
