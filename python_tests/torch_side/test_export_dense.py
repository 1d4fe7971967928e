"""Dense CLIP and TIPSv2 as bundles: written from files without torch, and by torch."""

import sys

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from support import golden_tips, tiny
from support.command_line import python, run
from support.errors import refused
from support.golden import assert_close, case_of, load
from support.golden_tips import model_of
from support.graph_runs import run_encoder, run_file
from zsseg_rt import Bundle, Engine, EngineConfig, models
from zsseg_rt.cli.output import EXIT_FAILURE, EXIT_OK
from zsseg_rt.errors import (
    ArgumentError,
    BackendUnavailableError,
    BundleError,
    CheckpointError,
    ShapeError,
    VocabularyError,
)
from zsseg_rt.export import export_bundle, export_graphs, verify_bundle
from zsseg_rt.export.architectures.tips import TipsSettings, export_tips_files
from zsseg_rt.export.clip_file import DenseHead, export_clip_file
from zsseg_rt.export.text_side import imagenet_templates
from zsseg_rt.networks import heads
from zsseg_rt.networks.aggregating import RULES_OF_OUTLIERS
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.networks.tips import TipsImage, TipsText, dense_embeds
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.writer import save_onnx
from zsseg_rt.ops import reference
from zsseg_rt.text.piece_tokenizer import PieceTokenizer
from zsseg_rt.torch_files.clip_arrays import read_clip
from zsseg_rt.torch_files.tips_weights import TEMPLATES, sort_tips

pytestmark = pytest.mark.usefixtures("without_gradients")
SIZES = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
TOWERS = {"num_heads": SIZES.num_heads, "text_heads": SIZES.text_heads}
FLOAT32 = EngineConfig(device="cpu", precision="float32", use_cache=False)

# What the command line runs, in a process that must not load torch.
WITHOUT_TORCH = """
import sys
from zsseg_rt.cli import main
code = main(sys.argv[1:])
assert not {"torch", "onnx", "open_clip", "torchvision"} & set(sys.modules)
sys.exit(code)
"""


def save(path, **changes):
    tensors = {key: value.contiguous() for key, value in tiny.clip_state_dict(SIZES).items()}
    tensors.update(changes)
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights") / "clip.safetensors")


def build(weights, **config):
    options = {"activation": "quick_gelu", "image_size": (64, 96), **TOWERS, **config}
    return models.create_model("dense_clip", pretrained=weights, **options)


def settings(**changes):
    fields = {"size_hw": (64, 96), "activation": "quick_gelu", **TOWERS, **changes}
    return DenseHead(**fields)


def assert_same(written, traced):
    """Two bundles that label alike, stage by stage."""
    one, other = Bundle.load(written), Bundle.load(traced)
    for part in ("family", "architecture", "head", "preprocess"):
        assert getattr(one, part) == getattr(other, part)
    for part in ("templates", "template_set", "context_length", "embed_dim", "words", "space"):
        assert getattr(one.text, part) == getattr(other.text, part)
    texts = [(path / "tokenizer.json").read_text() for path in (written, traced)]
    assert texts[0] == texts[1]
    actual, expected = (dict(np.load(path / "golden.npz")) for path in (written, traced))
    assert actual.keys() == expected.keys()
    for stage in ("image", "text_embeds", "prompt_embeds", "patch_embeds", "mask_logits"):
        assert_close(actual[stage], expected[stage])
    assert one.graphs == other.graphs  # to the byte


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_runs_checkpoint_is_read(dtype, tmp_path):
    tensors = {key: value.to(dtype) for key, value in tiny.clip_state_dict(SIZES).items()}
    saved = {f"module.{key}": value for key, value in tensors.items()}
    torch.save({"epoch": np.int64(3), "state_dict": saved}, tmp_path / "epoch_3.pt")
    floats = {key: value.float().contiguous() for key, value in tensors.items()}
    save_file(floats, tmp_path / "clip.safetensors")
    save_file({k: v.contiguous() for k, v in saved.items()}, tmp_path / "run.safetensors")
    expected = read_clip(tmp_path / "clip.safetensors")
    for name in ("epoch_3.pt", "run.safetensors"):
        clip = read_clip(tmp_path / name)
        for mine, theirs in ((clip.visual, expected.visual), (clip.text, expected.text)):
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("head", ["naclip", "maskclip"])
def test_it_equals_what_torch_writes(head, weights, tmp_path):
    options = {"templates": ["a {}.", "the {}", "see {}"], "space": "s"}
    written = export_clip_file(weights, tmp_path / "a.zsseg", settings(head=head), **options)
    model = build(weights, head=head)
    assert_same(written, export_bundle(model, tmp_path / "b.zsseg", verify=False, **options))
    Bundle.load(written).verify()


@pytest.mark.parametrize(("source", "head"), [("demo", "sc_clip"), ("file", "maskclip")])
def test_the_command_loads_no_torch(source, head, weights, tmp_path):
    clip = weights if source == "file" else "demo"
    towers = ("--num-heads", SIZES.num_heads, "--text-heads", SIZES.text_heads)
    sizes = () if source == "demo" else (*towers, "--activation", "gelu", "--size", "64")
    call = ("export", "dense-clip", "--clip", clip, "--head", head, "--out", tmp_path / "a.zsseg")
    home = {"ZSSEG_HOME": str(tmp_path / "home")}
    done = python("-c", WITHOUT_TORCH, *call, *sizes, more_env=home)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.load(tmp_path / "a.zsseg")
    assert bundle.architecture == f"dense_clip {head}"
    assert set(bundle.graphs["image_encoder"]) == {"float32", "float16"}
    assert bundle.provenance["source"] == (weights.name if source == "file" else "demo")


def test_files_that_are_no_clip_are_refused(tmp_path):
    path, out = tmp_path / "clip.safetensors", tmp_path / "a.zsseg"
    state, name = tiny.clip_state_dict(SIZES), "visual.transformer.resblocks.1.mlp.c_fc.weight"
    textless = dict.fromkeys(key for key in state if not key.startswith("visual."))
    for changes in ({name: None}, {name: state[name] * float("nan")}, textless, "cut", "missing"):
        path.unlink(missing_ok=True)
        if changes != "missing":
            save(path, **(changes if changes != "cut" else {}))
        if changes == "cut":
            path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=r"clip\.safetensors"):
            export_clip_file(path, out, settings())
    assert not out.exists()


def test_bad_settings_are_refused(weights, tmp_path):
    for error, argument, changes in (
        (ArgumentError, "head", {"head": "nothing"}),
        (ArgumentError, "activation", {"activation": "relu"}),
        (ArgumentError, "logit_scale", {"logit_scale": 0.0}),
        (ArgumentError, "unknown_below", {"unknown_below": 2.0}),
        (ShapeError, "image_size", {"size_hw": (60, 64)}),
        (CheckpointError, "num_heads", {"num_heads": 7}),
        (CheckpointError, "text_heads", {"text_heads": 0}),
    ):
        with refused(error, argument):
            export_clip_file(weights, tmp_path / "a.zsseg", settings(**changes))
    with refused(ArgumentError, "text_encoder"):
        export_clip_file(weights, tmp_path / "a.zsseg", settings(), text_encoder=None)
    with refused(BundleError, "path"):
        export_clip_file(weights, tmp_path / "a", settings())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head", [name for name in heads.HEADS if name not in RULES_OF_OUTLIERS])
def test_one_attention_a_product_and_nothing_unused(head, weights, tmp_path):
    """A softmax for each product of the head's rule; no MLP where the head has none."""
    files = export_graphs(build(weights, head=head), tmp_path, precisions=("float32",))
    graph = onnx.load(tmp_path / files["image_encoder"]["float32"].file).graph
    operators = [node.op_type for node in graph.node]
    before = SIZES.num_layers - 1
    products = {"sclip": 2, "maskclip": 0}.get(head, 1)
    assert operators.count("Softmax") == before + products
    mlps = before + (head in ("vanilla", "sclip", "maskclip"))
    assert operators.count("Sigmoid") == mlps  # one a QuickGELU
    assert not set(operators) & {"If", "Loop", "Scan", "Pow", "ReduceMean"}
    assert [value.name for value in graph.output] == ["patch_embeds"]
    # Projections that the head reads and the one out; MaskCLIP's are merged.
    last = {"vanilla": 4, "sclip": 4, "clearclip": 3, "naclip": 3, "maskclip": 1}
    sizes = [tuple(tensor.dims) for tensor in graph.initializer]
    assert sizes.count((SIZES.width, SIZES.width)) == 4 * before + last[head]


def test_threshold_and_default_templates_reach_the_bundle(weights, tmp_path):
    model = build(weights, unknown_below=0.9, logit_scale=12.5)
    path = export_bundle(
        model, tmp_path / "a.zsseg", text_encoder=None, precisions=("float32",), verify=False
    )
    bundle = Bundle.load(path)
    assert (bundle.head.unknown_below, bundle.head.logit_scale) == (0.9, 12.5)
    with Engine(bundle, FLOAT32) as engine:
        assert engine.self_check().passed  # the golden labels are without threshold
    assert bundle.text.template_set == "imagenet-80"
    assert bundle.text.templates == imagenet_templates()
    published = pytest.importorskip("open_clip").OPENAI_IMAGENET_TEMPLATES
    assert bundle.text.templates == tuple(template("{}") for template in published)


def test_the_command_line_with_torch(weights, tmp_path, capsys):
    towers = ("--num-heads", SIZES.num_heads, "--text-heads", SIZES.text_heads)
    code = run(
        *("export", "dense-clip", "--pretrained", weights, "--out", tmp_path / "c.zsseg"),
        *("--head", "clearclip", "--activation", "quick_gelu", *towers, "--size", "64x32"),
        *("--template", "a {}.", "--precision", "float32"),
    )
    assert code == 0, capsys.readouterr().err
    bundle = Bundle.load(tmp_path / "c.zsseg")
    assert bundle.architecture == "dense_clip clearclip"
    assert (bundle.head.grid_hw, bundle.head.logit_scale) == ((4, 2), 50.0)
    assert set(bundle.graphs) == {"image_encoder", "text_encoder"}
    assert bundle.provenance["source"] == "clip.safetensors"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--size", "4x4x4"), 2, "--size: expected SIDE or HEIGHTxWIDTH in pixels, got '4x4x4'"),
        (("--size", "-16"), 2, "--size: expected SIDE or HEIGHTxWIDTH in pixels, got '-16'"),
        (("--activation", "relu"), 2, "--activation: expected quick_gelu or gelu, got relu"),
        (("--head", "x"), 1, "head: expected one of vanilla, maskclip, sclip, clearclip, naclip"),
        (("--clip", "demo"), 2, "--pretrained: expected"),
        ((), 1, "--pretrained: expected a CLIP file, got absent.pt"),
    ],
)
def test_command_line_refusals_with_torch(tmp_path, capsys, arguments, code, message):
    out = tmp_path / "c.zsseg"
    assert run("export", "dense-clip", "--clip", "ViT-B-16", "--out", out) == 2
    status = run("export", "dense-clip", "--pretrained", "absent.pt", "--out", out, *arguments)
    assert status == code
    assert message in capsys.readouterr().err
    assert not out.exists()


# --- TIPSv2: graphs against the official vectors, names through the engine ------------------------

STAGES = 2e-5  # relative; the vectors' README measured 2e-6 between float32 and float64
HEADS = {"num_heads": 4, "text_heads": 4}
SETTINGS = TipsSettings(size_hw=(84, 126), **HEADS)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def tower_of(c):
    visual = sort_tips(golden_tips.vision(**c), {}).visual
    return TipsImage(tensors=visual, num_heads=c["heads"], activation="gelu")


def run_graph(tower, image, path):
    return run_encoder(lambda graph, x: dense_embeds(graph, tower, x), image, path)


def cosines_of(embeds, expected):
    return (embeds[0] @ expected["text"].T).T.reshape(expected["cosines"].shape)


@pytest.mark.parametrize("case", ["square", "wide", "tall", "ragged"])
def test_every_stage_is_the_official_one(shared_dir, case, tmp_path):
    """By NumPy, OpenVINO and torch."""
    expected, c = case_of(load(shared_dir, "tips_small_public.npz"), case)
    tower, ops = tower_of(c), Arrays()
    image = torch.from_numpy(expected["image"][None])
    if case == "ragged":  # as the authors do it before the network
        size = tuple(14 * expected["grid"])
        image = torch.nn.functional.interpolate(image, size, mode="bicubic", align_corners=False)
    embeds = dense_embeds(ops, tower, image.numpy())
    for mark, stage in (
        ("tokens", expected["tokens"]),
        ("blocks.0", expected["block0"]),
        (f"blocks.{c['depth'] - 2}", expected["last_block_input"]),
        ("last_block", expected["value_path"][2:]),
        ("ln_post", expected["dense"]),
    ):
        assert_close(ops.marks[mark][0], stage, STAGES)
    text = torch.from_numpy(expected["text"])
    out, scaled = model_of(c)(image, text), model_of(c, logit_scale=20.0)(image, text)
    torch.testing.assert_close(scaled.mask_logits, 20 * out.mask_logits)
    assert_close(out.mask_logits[0], expected["cosines"])
    assert_close(out.cls_embed[0], unit(expected["plain_norm"][0]), STAGES)
    in_torch = out.patch_embeds.flatten(2).mT.numpy()
    for result in (embeds, run_graph(tower, image.numpy(), tmp_path / "a.onnx"), in_torch):
        assert_close(result[0], unit(expected["dense"]), STAGES)
        cosines = cosines_of(result, expected)
        assert_close(cosines, expected["cosines"])
        np.testing.assert_array_equal(cosines.argmax(0), expected["cosines"].argmax(0))


@pytest.mark.nightly
def test_b14_has_the_official_labels(shared_dir, tmp_path):
    expected, c = case_of(load(shared_dir, "tips_real_public.npz"), "b14_448")
    image = expected["rgb"].transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    image = np.ascontiguousarray(image)
    written = run_graph(tower_of(c), image, tmp_path / "a.onnx")
    out = model_of(c)(torch.from_numpy(image), torch.from_numpy(expected["text"]))
    assert_close(out.cls_embed[0], unit(expected["cls"][0]), STAGES)
    for logits in (cosines_of(written, expected), out.mask_logits[0].numpy()):
        assert_close(logits, expected["cosines"])
        np.testing.assert_array_equal(logits.argmax(0), expected["cosines"].argmax(0))


@pytest.mark.parametrize(
    ("file", "case"),
    [("small", "text"), pytest.param("real", "b14_text", marks=pytest.mark.nightly)],
)
def test_texts_are_embedded_as_officially(shared_dir, file, case, tmp_path):
    """By NumPy, OpenVINO and torch."""
    expected, c = case_of(load(shared_dir, f"tips_{file}_public.npz"), case)
    text, ops = golden_tips.text(**c), Arrays()
    length = expected["ids"].shape[1]
    tower = TipsText(tensors=text, num_heads=c["heads"], context_length=length)
    tokens = np.where(expected["padding"] == 1, c["vocab"], expected["ids"])
    pooled = tower.embed(ops, tokens)
    assert_close(pooled, expected["pooled"], STAGES)
    save_onnx(WrittenText(tower=tower).network(), "text_encoder", tmp_path / "t.onnx")
    embeds = run_file(tmp_path / "t.onnx", {"token_ids": tokens})["text_embeds"]
    assert_close(embeds, expected["pooled"], STAGES)
    if case != "text":
        return
    towers = {"vision": golden_tips.vision(**c | {"depth": 1, "img": 112})}
    towers["text"] = text | {"temperature": np.float32(0.05)}
    model = models.from_official("tips", towers, num_heads=c["heads"], text_heads=c["heads"])
    shorter = tokens[:, : int((expected["padding"] == 0).sum(1).max())]
    for ids in (tokens, shorter):
        assert_close(model.text_encoder(torch.from_numpy(ids)), expected["pooled"], STAGES)
    assert_close(unit(unit(pooled[:3]).mean(0)), expected["class_row_of_first_three"], STAGES)
    kept = expected["padding"][:3, :12] == 0  # padded rows are never read
    for block, name in (("0", "block0"), (str(c["layers"] - 1), "last_block")):
        rows = ops.marks[f"blocks.{block}"][:3, :12][kept]
        assert_close(rows, expected[f"{name}_first_three_12"][kept], STAGES)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The authors' files in small, and a tokenizer."""
    pytest.importorskip("sentencepiece", reason="needs pip install '.[tips]'")
    folder = tmp_path_factory.mktemp("tips")
    text = golden_tips.text() | {"temperature": np.float32(0.04)}
    np.savez(folder / "tips_vision.npz", **golden_tips.vision())
    np.savez(folder / "tips_text.npz", **text)
    (folder / "spm.model").write_bytes(golden_tips.pieces())
    return folder


@pytest.fixture(scope="module")
def towers(files):
    return files / "tips_vision.npz", files / "tips_text.npz"


@pytest.fixture(scope="module")
def bundle(files, towers):
    options = {"tokenizer": files / "spm.model", "verify": False}
    return export_tips_files(*towers, files / "tips.zsseg", SETTINGS, **options)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_texts_are_cut_into_the_models_own_pieces(files, kind):
    import sentencepiece

    model = golden_tips.pieces(kind)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=model), PieceTokenizer(model)
    texts = ["A photo of the DOGS.", "traffic  light", "Étagère STRASSE 漢字 \t x", "road" * 99]
    rows = ours.encode(texts)
    assert (rows.shape, rows.dtype) == ((4, 64), np.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = theirs.encode(text.lower())
        assert theirs.unk_id() == 0
        np.testing.assert_array_equal(row[: len(ids)], ids[:64])
        assert (row[len(ids) :] == ours.vocab_size).all()
    assert (ours.encode(["漢"])[0] == 0).any()  # an unknown piece is no padding
    for nothing in ("", "  ", "\u200b"):
        with refused(VocabularyError, "class_names"):
            ours.encode(["dog", nothing])


def test_the_bundle_takes_new_words(bundle, towers):
    loaded = Bundle.load(bundle)
    assert loaded.text.tokenizer.file == "tokenizer.model"
    assert loaded.text.templates == TEMPLATES
    assert (loaded.family, loaded.architecture, loaded.head.grid_hw) == ("dense", "tips", (6, 9))
    assert loaded.head.logit_scale == pytest.approx(25)
    assert set(loaded.graphs["image_encoder"]) == {"float32", "float16"}
    assert verify_bundle(bundle).passed
    model = models.create_model("tips", vision=towers[0], text=towers[1], **HEADS)
    names, frame = ["Dog", "traffic light"], np.full((168, 252, 3), 90, np.uint8)
    frame[:80] = (200, 30, 60)
    tokens = PieceTokenizer(golden_tips.pieces()).encode(
        [template.replace("{}", name) for name in names for template in TEMPLATES]
    )
    prompts = model.text_encoder(torch.from_numpy(tokens)).numpy()
    expected = unit(unit(prompts).reshape(2, 9, -1).mean(1))
    with Engine(loaded, FLOAT32) as engine:
        vocabulary = engine.set_classes(names)
        np.testing.assert_allclose(vocabulary.embeds, expected, atol=1e-5)
        seg = engine.segment(frame)
        engine.set_classes(["étagère", "sky"], templates=["a {}"])
        assert engine.segment(frame).names == ("étagère", "sky")
        assert engine.self_check().passed
    planes = reference.preprocess(frame, size_hw=(84, 126), mean=(0, 0, 0), std=(1, 1, 1))
    logits = model(torch.from_numpy(planes[None]), torch.from_numpy(expected)).mask_logits
    best = torch.nn.functional.interpolate(logits, size=(168, 252), mode="bilinear")[0]
    clear = (best.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-4).numpy()
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(seg.labels[clear], best.argmax(0).numpy()[clear])


def test_the_command_makes_the_bundle(files, towers, tmp_path, capsys):
    vision, *text = (towers[0], "--text", towers[1])
    wide = files / "wide.npz"  # heads of the published sizes: one per 64 channels
    np.savez(wide, **golden_tips.vision(depth=2))
    asked = (wide, *text, "--tokenizer", files / "spm.model", "--size", "84x126")
    call = ("import-checkpoint", "tips", *asked, "--out", tmp_path / "a.zsseg", "--licence", "X")
    done = python("-c", WITHOUT_TORCH, *call)
    assert done.returncode == 0, done.stderr
    assert Bundle.load(tmp_path / "a.zsseg").licence == "X"
    command = ("import-checkpoint", "tips", "--out", tmp_path / "b.zsseg")
    assert run(*command, vision, *text) == EXIT_FAILURE
    assert "--tokenizer" in capsys.readouterr().err
    assert run(*command, vision, "--size", "100") != EXIT_OK
    assert run(*command, files / "no.npz") == EXIT_FAILURE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zsseg"]


def test_a_model_in_torch_makes_the_same_bundle(bundle, towers, tmp_path):
    sizes = {"logit_scale": None, "image_size": (84, 126), **HEADS}
    model = models.create_model("tips", vision=towers[0], text=towers[1], **sizes)
    path = tmp_path / "a.zsseg"
    options = {"precisions": ("float32",), "verify": False}
    export_bundle(model, path, tokenizer=golden_tips.pieces(), **options)
    golden, expected = (np.load(one / "golden.npz") for one in (path, bundle))
    for stage in ("patch_embeds", "mask_logits", "prompt_embeds"):
        np.testing.assert_allclose(golden[stage], expected[stage], rtol=1e-5, atol=1e-5)
    with refused(ArgumentError, "tokenizer"):
        export_bundle(model, tmp_path / "b.zsseg")
    with refused(ArgumentError, "text_encoder"):
        export_bundle(model, tmp_path / "b.zsseg", text_encoder=model)
    export_bundle(model, tmp_path / "b.zsseg", text_encoder=None, **options)


def test_other_tokenizers_and_sizes_are_refused(files, towers, tmp_path):
    with refused(ShapeError, "image_size", "14"):
        export_tips_files(towers[0], None, tmp_path / "a.zsseg", TipsSettings(size_hw=(448, 512)))
    for error, named, options in (
        (CheckpointError, "tokenizer", {"tokenizer": golden_tips.pieces(size=90)}),
        (BundleError, "tokenizer.model", {"tokenizer": b"{}"}),
        (CheckpointError, "tokenizer", {"tokenizer": files / "missing.model"}),
        (ArgumentError, "tokenizer", {}),
    ):
        with refused(error, named):
            export_tips_files(*towers, tmp_path / "a.zsseg", SETTINGS, **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with Engine(bundle, FLOAT32) as engine:
        with refused(BackendUnavailableError, "sentencepiece", "'.[tips]'"):
            engine.set_classes(["tree"])
        engine.set_classes(["a"], embeddings=golden_tips.rule("rows", (1, 64), ""))
