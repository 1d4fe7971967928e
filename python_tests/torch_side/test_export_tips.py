"""TIPSv2's files as bundles: graphs against the official vectors, names through the engine."""

import sys

import numpy as np
import pytest

from support import golden_tips
from support.command_line import python, run
from support.errors import refused

torch = pytest.importorskip("torch")

from support.golden import case_of, load  # noqa: E402
from support.golden_tips import model_of  # noqa: E402
from support.graph_runs import run_encoder, run_file  # noqa: E402
from zsseg_rt import Bundle, Engine, EngineConfig, models  # noqa: E402
from zsseg_rt.cli.output import EXIT_FAILURE, EXIT_OK  # noqa: E402
from zsseg_rt.errors import (  # noqa: E402
    ArgumentError,
    BackendUnavailableError,
    BundleError,
    CheckpointError,
    ShapeError,
    VocabularyError,
)
from zsseg_rt.export import export_bundle, verify_bundle  # noqa: E402
from zsseg_rt.export.architectures.tips import TipsSettings, export_tips_files  # noqa: E402
from zsseg_rt.networks.tips import TipsImage, TipsText, dense_embeds  # noqa: E402
from zsseg_rt.onnx.arrays import Arrays  # noqa: E402
from zsseg_rt.onnx.writer import save_onnx  # noqa: E402
from zsseg_rt.ops import reference  # noqa: E402
from zsseg_rt.text.piece_tokenizer import PieceTokenizer  # noqa: E402
from zsseg_rt.torch_files.tips_weights import TEMPLATES, sort_tips  # noqa: E402

STAGES = 2e-5  # relative; the vectors' README measured 2e-6 between float32 and float64
LOGITS = 1e-5
SHAPES = ["square", "wide", "tall", "ragged"]


def stretched(image, grid):
    size = (14 * grid[0], 14 * grid[1])
    return torch.nn.functional.interpolate(image, size=size, mode="bicubic", align_corners=False)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def padded(ids, padding, vocab):
    """Ids with our mark of padding."""
    return torch.from_numpy(np.where(padding == 1, vocab, ids))


HEADS = {"num_heads": 4, "text_heads": 4}
SETTINGS = TipsSettings(size_hw=(84, 126), **HEADS)
FLOAT32 = EngineConfig(device="cpu", precision="float32", use_cache=False)


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def tower_of(c):
    visual = sort_tips(golden_tips.vision(**c), {}).visual
    return TipsImage(tensors=visual, num_heads=c["heads"], activation="gelu")


def run_graph(tower, image, path):
    return run_encoder(lambda graph, x: dense_embeds(graph, tower, x), image, path)


@pytest.mark.parametrize("case", SHAPES)
def test_every_stage_is_the_official_one(shared_dir, case, tmp_path):
    """By NumPy, OpenVINO and torch."""
    expected, c = case_of(load(shared_dir, "tips_small_public.npz"), case)
    tower, ops = tower_of(c), Arrays()
    image = expected["image"][None]
    if case == "ragged":  # as the authors do it before the network
        image = stretched(torch.from_numpy(image), tuple(expected["grid"])).numpy()
    embeds = dense_embeds(ops, tower, image)
    close(ops.marks["tokens"][0], expected["tokens"], STAGES)
    close(ops.marks["blocks.0"][0], expected["block0"], STAGES)
    last = ops.marks[f"blocks.{c['depth'] - 2}"][0]
    close(last, expected["last_block_input"], STAGES)
    close(ops.marks["last_block"][0], expected["value_path"][2:], STAGES)
    close(ops.marks["ln_post"][0], expected["dense"], STAGES)
    text = torch.from_numpy(expected["text"])
    with torch.no_grad():
        out = model_of(c)(torch.from_numpy(image), text)
        scaled = model_of(c, logit_scale=20.0)(torch.from_numpy(image), text)
    torch.testing.assert_close(scaled.mask_logits, 20 * out.mask_logits)
    close(out.mask_logits[0].numpy(), expected["cosines"], LOGITS)
    close(out.cls_embed[0].numpy(), unit(expected["plain_norm"][0]), STAGES)
    in_torch = out.patch_embeds.flatten(2).mT.numpy()
    for result in (embeds, run_graph(tower, image, tmp_path / "a.onnx"), in_torch):
        close(result[0], unit(expected["dense"]), STAGES)
        cosines = (result[0] @ expected["text"].T).T.reshape(expected["cosines"].shape)
        close(cosines, expected["cosines"], LOGITS)
        np.testing.assert_array_equal(cosines.argmax(0), expected["cosines"].argmax(0))


@pytest.mark.nightly
def test_b14_has_the_official_labels(shared_dir, tmp_path):
    expected, c = case_of(load(shared_dir, "tips_real_public.npz"), "b14_448")
    image = expected["rgb"].transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    image = np.ascontiguousarray(image)
    written = run_graph(tower_of(c), image, tmp_path / "a.onnx")
    with torch.no_grad():
        out = model_of(c)(torch.from_numpy(image), torch.from_numpy(expected["text"]))
    close(out.cls_embed[0].numpy(), unit(expected["cls"][0]), STAGES)
    cosines = (written[0] @ expected["text"].T).T.reshape(expected["cosines"].shape)
    for logits in (cosines, out.mask_logits[0].numpy()):
        close(logits, expected["cosines"], LOGITS)
        np.testing.assert_array_equal(logits.argmax(0), expected["cosines"].argmax(0))


@pytest.mark.parametrize(
    ("file", "case"),
    [("small", "text"), pytest.param("real", "b14_text", marks=pytest.mark.nightly)],
)
def test_texts_are_embedded_as_officially(shared_dir, file, case, tmp_path):
    """By NumPy, OpenVINO and torch."""
    from zsseg_rt.networks.text import WrittenText

    expected, c = case_of(load(shared_dir, f"tips_{file}_public.npz"), case)
    text, ops = golden_tips.text(**c), Arrays()
    length = expected["ids"].shape[1]
    tower = TipsText(tensors=text, num_heads=c["heads"], context_length=length)
    tokens = padded(expected["ids"], expected["padding"], c["vocab"]).numpy()
    pooled = tower.embed(ops, tokens)
    close(pooled, expected["pooled"], STAGES)
    save_onnx(WrittenText(tower=tower).network(), "text_encoder", tmp_path / "t.onnx")
    embeds = run_file(tmp_path / "t.onnx", {"token_ids": tokens})["text_embeds"]
    close(embeds, expected["pooled"], STAGES)
    if case != "text":
        return
    towers = {"vision": golden_tips.vision(**c | {"depth": 1, "img": 112})}
    towers["text"] = text | {"temperature": np.float32(0.05)}
    model = models.from_official("tips", towers, num_heads=c["heads"], text_heads=c["heads"])
    shorter = tokens[:, : int((expected["padding"] == 0).sum(1).max())]
    with torch.no_grad():
        for ids in (tokens, shorter):
            close(model.text_encoder(torch.from_numpy(ids)).numpy(), expected["pooled"], STAGES)
    row = unit(unit(pooled[:3]).mean(0))
    close(row, expected["class_row_of_first_three"], STAGES)
    kept = expected["padding"][:3, :12] == 0  # padded rows are never read
    for block, name in (("0", "block0"), (str(c["layers"] - 1), "last_block")):
        rows = ops.marks[f"blocks.{block}"][:3, :12][kept]
        close(rows, expected[f"{name}_first_three_12"][kept], STAGES)


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
def bundle(files):
    path = files / "tips.zsseg"
    export_tips_files(
        files / "tips_vision.npz",
        files / "tips_text.npz",
        path,
        SETTINGS,
        tokenizer=files / "spm.model",
        verify=False,
    )
    return path


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


def test_the_bundle_takes_new_words(bundle, files):
    loaded = Bundle.load(bundle)
    assert loaded.text.tokenizer.file == "tokenizer.model"
    assert loaded.text.templates == TEMPLATES
    assert (loaded.family, loaded.architecture, loaded.head.grid_hw) == ("dense", "tips", (6, 9))
    assert loaded.head.logit_scale == pytest.approx(25)
    assert set(loaded.graphs["image_encoder"]) == {"float32", "float16"}
    assert verify_bundle(bundle).passed
    model = models.create_model(
        "tips", vision=files / "tips_vision.npz", text=files / "tips_text.npz", **HEADS
    )
    names, frame = ["Dog", "traffic light"], np.full((168, 252, 3), 90, np.uint8)
    frame[:80] = (200, 30, 60)
    tokens = PieceTokenizer(golden_tips.pieces()).encode(
        [template.replace("{}", name) for name in names for template in TEMPLATES]
    )
    with torch.no_grad():
        prompts = model.text_encoder(torch.from_numpy(tokens)).numpy()
    expected = unit(unit(prompts).reshape(2, 9, -1).mean(1))
    with Engine(loaded, FLOAT32) as engine:
        vocabulary = engine.set_classes(names)
        np.testing.assert_allclose(vocabulary.embeds, expected, atol=1e-5)
        seg = engine.segment(frame)
        engine.set_classes(["étagère", "sky"], templates=["a {}"])
        assert engine.segment(frame).names == ("étagère", "sky")
        assert engine.self_check().passed
    with torch.no_grad():
        planes = reference.preprocess(frame, size_hw=(84, 126), mean=(0, 0, 0), std=(1, 1, 1))
        logits = model(torch.from_numpy(planes[None]), torch.from_numpy(expected)).mask_logits
        best = torch.nn.functional.interpolate(logits, size=(168, 252), mode="bilinear")[0]
    clear = (best.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-4).numpy()
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(seg.labels[clear], best.argmax(0).numpy()[clear])


WITHOUT_TORCH = """
import sys
from zsseg_rt.cli import main
code = main(sys.argv[1:])
assert not {"torch", "onnx", "open_clip"} & set(sys.modules)
sys.exit(code)
"""


def test_the_command_makes_the_bundle(files, tmp_path, capsys):
    towers = (files / "tips_vision.npz", "--text", files / "tips_text.npz")
    wide = files / "wide.npz"  # heads of the published sizes: one per 64 channels
    np.savez(wide, **golden_tips.vision(depth=2))
    out = tmp_path / "a.zsseg"
    asked = (wide, *towers[1:], "--tokenizer", files / "spm.model", "--size", "84x126")
    call = ("import-checkpoint", "tips", *asked, "--out", out, "--licence", "X")
    done = python("-c", WITHOUT_TORCH, *call)
    assert done.returncode == 0, done.stderr
    assert Bundle.load(out).licence == "X"
    assert run("import-checkpoint", "tips", *towers, "--out", tmp_path / "b.zsseg") == EXIT_FAILURE
    assert "--tokenizer" in capsys.readouterr().err
    other = ("--size", "100", "--out", tmp_path / "c.zsseg")
    assert run("import-checkpoint", "tips", towers[0], *other) != EXIT_OK
    code = run("import-checkpoint", "tips", files / "no.npz", "--out", tmp_path / "d.zsseg")
    assert code == EXIT_FAILURE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zsseg"]


def test_a_model_in_torch_makes_the_same_bundle(bundle, files, tmp_path):
    model = models.create_model(
        "tips", vision=files / "tips_vision.npz", text=files / "tips_text.npz",
        logit_scale=None, image_size=(84, 126), **HEADS,
    )  # fmt: skip
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


def test_other_tokenizers_and_sizes_are_refused(files, tmp_path):
    with refused(ShapeError, "image_size", "14"):
        settings = TipsSettings(size_hw=(448, 512))
        export_tips_files(files / "tips_vision.npz", None, tmp_path / "a.zsseg", settings)
    towers = (files / "tips_vision.npz", files / "tips_text.npz", tmp_path / "a.zsseg", SETTINGS)
    with refused(CheckpointError, "tokenizer"):
        export_tips_files(*towers, tokenizer=golden_tips.pieces(size=90))
    with refused(BundleError, "tokenizer.model"):
        export_tips_files(*towers, tokenizer=b"{}")
    with refused(CheckpointError, "tokenizer"):
        export_tips_files(*towers, tokenizer=files / "missing.model")
    with refused(ArgumentError, "tokenizer"):
        export_tips_files(*towers)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with Engine(bundle, FLOAT32) as engine:
        with refused(BackendUnavailableError, "sentencepiece", "'.[tips]'"):
            engine.set_classes(["tree"])
        engine.set_classes(["a"], embeddings=golden_tips.rule("rows", (1, 64), ""))
