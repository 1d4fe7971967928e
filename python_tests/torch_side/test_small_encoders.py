"""CLIP in every layout, PE-Core and SigLIP 2: official vectors by NumPy, OpenVINO and torch."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from support import golden_encoders as golden
from support.command_line import run
from support.errors import refused
from support.golden_encoders import gemma_model, open_clips, towers
from support.graph_runs import run_encoder, run_file
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.errors import ArgumentError, BundleError, CheckpointError, VocabularyError
from zsseg_rt.export.clip_file import DenseHead, export_clip_file
from zsseg_rt.export.words import tokenizer_json
from zsseg_rt.models import from_official, load_clip
from zsseg_rt.networks import heads, pooled
from zsseg_rt.networks.aggregating import AggregationConfig
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.writer import save_onnx
from zsseg_rt.text.piece_tokenizer import GemmaTokenizer, canonical_text, gemma_json
from zsseg_rt.text.tokenizer import Tokenizer
from zsseg_rt.torch_files.clip_arrays import ClipTensors, Tower, read_clip
from zsseg_rt.torch_files.clip_layouts import as_clip

STAGE, COSINE = 2e-5, 5e-6
CASES = [
    ("hfclip_small_public.npz", "a"),
    ("hfclip_small_public.npz", "b"),
    ("siglip_small_public.npz", ""),
    ("pe_small_public.npz", ""),
    ("tinyclip8m_real_public.npz", ""),
    pytest.param("pe_s16_real_public.npz", "", marks=pytest.mark.nightly),
    pytest.param("siglip2_b16_real_public.npz", "", marks=pytest.mark.nightly),
]
NAMES = {"ln_pre": "pre_norm", "embedded": "embedded"}


def near(actual, expected, tolerance=STAGE):
    """Also of vectors that hold every k-th channel alone."""
    if actual.shape != expected.shape:
        step = actual.shape[-1] // expected.shape[-1]
        actual = actual[..., ::step]
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1, np.abs(expected).max())


def sizes_of(vectors):
    return sorted({key.split("/")[0] for key in vectors if re.match(r"\d+x\d+/", key)})


def encode(ops, image, tower, head, c):
    """The exporter's graph for a head of the vectors."""
    if isinstance(tower, pooled.PooledTower):
        return pooled.dense_embeds(ops, tower, image, head)
    if head == "sfp_l2":
        options = {"aggregation": AggregationConfig(pm="l2", **c.get("sfp", {}))}
        return heads.dense_embeds(ops, tower, image, "sfp", **options)
    return heads.dense_embeds(ops, tower, image, head)


def cosines(embeds, vectors, expected):
    text = vectors["text/embeds"]
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    return (embeds[0] @ text.T).T.reshape(expected.shape)


@pytest.mark.parametrize(("file", "part"), CASES)
def test_the_image_tower_gives_the_official_vectors(shared_dir, file, part, tmp_path):
    c, vectors, _, tower, _ = towers(shared_dir, file, part)
    for size in sizes_of(vectors):
        size_hw = tuple(map(int, size.split("x")))
        image = golden.image(c["salt"], size_hw)
        for key in [k for k in vectors if k.startswith(f"{size}/cosines/")]:
            head, ops = key.rpartition("/")[2], Arrays()
            embeds = encode(ops, image, tower, head, c)
            near(cosines(embeds, vectors, vectors[key]), vectors[key], COSINE)
            stages = {f"blocks.{i}": block for i, block in enumerate(vectors[f"{size}/blocks"])}
            own = "_own" if head.endswith("_own") else ""
            for mark, name in (*NAMES.items(), ("dense", f"dense/{head}")):
                if f"{size}/{name}" in vectors:
                    stages[mark] = vectors[f"{size}/{name}"]
            if f"{size}/post_norm{own}" in vectors:
                stages["ln_post"] = vectors[f"{size}/post_norm{own}"][-embeds.shape[1] :]
            compared = stages.keys() & ops.marks.keys()
            # What precedes the blocks, and all but the last; of a pooled tower also what follows.
            follow = (2 if own else 3) if isinstance(tower, pooled.PooledTower) else 0
            assert len(compared) == len(tower.blocks) + follow
            for mark in compared:
                near(ops.marks[mark][0], stages[mark])
            if size != sizes_of(vectors)[0] and "real" not in file:
                continue  # one graph for each head
            write = partial(encode, tower=tower, head=head, c=c)
            result = run_encoder(write, image, tmp_path / "a.onnx")
            near(cosines(result, vectors, vectors[key]), vectors[key], COSINE)


@pytest.mark.parametrize(("file", "part"), CASES)
def test_the_text_tower_gives_the_official_vectors(shared_dir, file, part, tmp_path):
    _, vectors, _, _, tower = towers(shared_dir, file, part)
    ids, ops = vectors["text/ids"], Arrays()
    rows = tower.tensors["token_embedding.weight"][ids]
    feeds = {"token_embeds": rows} if isinstance(tower, pooled.SiglipText) else {"token_ids": ids}
    near(tower.embed(ops, *feeds.values()), vectors["text/embeds"])
    if "text/blocks" in vectors and "real" not in file:
        for index in range(vectors["text/blocks"].shape[1]):
            near(ops.marks[f"blocks.{index}"], vectors["text/blocks"][:, index])
    save_onnx(WrittenText(tower=tower).network(), "text_encoder", tmp_path / "t.onnx")
    near(run_file(tmp_path / "t.onnx", feeds)["text_embeds"], vectors["text/embeds"])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES[:2])
def test_torch_gives_the_official_vectors_of_clip(shared_dir, case):
    c, vectors, weights, _, _ = towers(shared_dir, *case)
    state = {f"module._orig_mod.{k}": torch.from_numpy(v) for k, v in weights.items()}
    state["module._orig_mod.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    text = torch.from_numpy(vectors["text/embeds"])
    for size in sizes_of(vectors):
        image = torch.from_numpy(golden.image(c["salt"], tuple(map(int, size.split("x")))))
        for key in [k for k in vectors if k.startswith(f"{size}/cosines/")]:
            head = key.rpartition("/")[2]
            model = from_official(
                "dense_clip", state, head=head.removesuffix("_l2"), position="size",
                pm="l2" if head == "sfp_l2" else None, activation=c["activation"],
                num_heads=c["vision"]["heads"], text_heads=c["text"]["heads"],
            )  # fmt: skip
            outputs = model(image, text)
            near(outputs.mask_logits[0].numpy(), vectors[key], COSINE)
        expected = vectors[f"{size}/image_embeds"]
        near(outputs.cls_embed[0].numpy(), expected / np.linalg.norm(expected), COSINE)
    near(model.text_encoder(torch.from_numpy(vectors["text/ids"])).numpy(), text.numpy())


SMALL = {"clip": CASES[0], "siglip": CASES[2], "pe": CASES[3]}


@pytest.mark.parametrize("kind", SMALL)
def test_all_layouts_are_the_same_weights(shared_dir, kind):
    weights = towers(shared_dir, *SMALL[kind])[2]
    plain, other = as_clip(dict(weights), "home"), open_clips(weights, kind)
    if kind != "clip":
        listed = json.loads((shared_dir / "specs" / "small_encoders_keys.json").read_text())
        name = "pe_core_s16_384" if kind == "pe" else "siglip2_b16_224"
        first = {k for k in listed[f"{name}.open_clip"] if not re.search(r"\.\d+\.", k)}
        assert first == {k for k in other if not re.search(r"\.\d+\.", k)}
    variants = [other, {f"module.{k}": v for k, v in other.items()}]
    if kind == "clip":
        parts = {"visual": "_image_encoder.module.", "logit": "_logit_scale."}
        named = {parts.get(re.split(r"[._]", k)[0], "_text_encoder.") + k: other[k] for k in other}
        variants += [named, {f"module.{k}": v for k, v in named.items()}]
    for variant in variants:
        stripped = {k.removeprefix("module."): v for k, v in variant.items()}
        rest = {k.removeprefix("text."): v for k, v in as_clip(stripped, "other").items()}
        for key, value in plain.items():
            np.testing.assert_array_equal(rest.pop(key.removeprefix("text.")), value)
        assert not rest


def gemma_rows(ids):
    ids = [*ids[:63], 1]
    return ids + [0] * (64 - len(ids))


def test_texts_are_cut_as_clip_and_gemma_cut_them(shared_dir):
    path = shared_dir / "golden/small_encoders_tokens_public.json"
    records, (texts, model) = json.loads(path.read_text()), gemma_model()
    for length in (77, 32):
        rows = Tokenizer(tokenizer_json(), length).encode([record["text"] for record in records])
        for row, record in zip(rows, records, strict=True):
            ids = record[f"clip{length}"]
            assert list(row) == ids + [0] * (length - len(ids))
    tokenizer = GemmaTokenizer(gemma_json(model))
    assert (len(texts), tokenizer.vocab_size) == (14, 256_000)  # of ten languages
    for text, ids in texts.items():
        assert list(tokenizer.encode([text])[0]) == gemma_rows(ids), text
    for record in records:
        assert canonical_text(record["text"]) == record["canonical"]
        if record["canonical"]:
            row = tokenizer.encode([record["text"]])[0]
            assert list(row) == gemma_rows(record["gemma_canonical"]), record["text"]
    for text in ("", " ", "...", "!?"):
        with refused(VocabularyError, "class_names"):
            tokenizer.encode([text])
    for broken in (b"{}", b'{"pieces":["<unk>"],"merges":["a b"]}', b"["):
        with refused(BundleError, "gemma.json"):
            GemmaTokenizer(broken)


def small_file(shared_dir, folder, kind="clip"):
    """Weights of a small model in its home layout; SigLIP's with a tokenizer of its size."""
    weights = towers(shared_dir, *SMALL[kind])[2]
    folder.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, folder / "m.safetensors")
    if kind == "siglip":
        (folder / "tokenizer.json").write_text(json.dumps({"model": gemma_model()[1]}))
    return folder / "m.safetensors"


HEADS = {"num_heads": 4, "text_heads": 4}


# Architecture, scale, context, mean of red, and the activation that is known.
SHOWN = {
    "clip": ("dense_clip naclip", 40, 77, 0.48145466, None),
    "pe": ("pe_core value_mlp", 50, 32, 0.5, "gelu"),
    "siglip": ("siglip value_mlp", 110, 64, 0.5, "gelu_tanh"),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_a_file_becomes_a_bundle_that_takes_words(shared_dir, kind, tmp_path):
    file, out = small_file(shared_dir, tmp_path / "in", kind), tmp_path / "a.zsseg"
    activation = "gelu" if kind == "clip" else None
    head = DenseHead(size_hw=(96, 160), activation=activation, **HEADS)
    export_clip_file(file, out, head, templates=["{}"])
    bundle, tower = Bundle.load(out), read_clip(file)
    bundle.verify()
    shown = (
        bundle.architecture, pytest.approx(bundle.head.logit_scale), bundle.text.context_length,
        pytest.approx(bundle.preprocess.mean[0]), tower.known_activation(),
    )  # fmt: skip
    assert shown == SHOWN[kind]
    assert tower.kind == kind
    config = EngineConfig(device="cpu", precision="float32", use_cache=False)
    with Engine(bundle, config) as engine:
        names = ["zdjęcie chodnika", "歩道の写真"] if kind == "siglip" else ["cat", "dog"]
        vocabulary = engine.set_classes(names)
        assert engine.segment(np.zeros((48, 64, 3), np.uint8)).labels.shape == (48, 64)
        assert engine.self_check().passed
    if kind == "siglip":
        tokenizer = GemmaTokenizer(out / "gemma.json")
        rows = tower.text["token_embedding.weight"][tokenizer.encode(names)]
        embeds = pooled.SiglipText(tensors=tower.text, num_heads=4).embed(Arrays(), rows)
        embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
        np.testing.assert_allclose(vocabulary.embeds, embeds, atol=2e-3)  # rows of 11 bits
        assert np.load(out / "token_rows.npy", mmap_mode="r").dtype == np.float16


CONFIG = {
    "model_type": "clip",
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4,
                      "hidden_act": "gelu"},
    "text_config_dict": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "hidden_act": "gelu"},
}  # fmt: skip


def test_settings_come_from_the_files_beside_the_weights(shared_dir, tmp_path):
    file = small_file(shared_dir, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(colours))
    export_clip_file(file, tmp_path / "a.zsseg", DenseHead(size_hw=(96, 96)), templates=["{}"])
    bundle = Bundle.load(tmp_path / "a.zsseg")
    assert bundle.provenance["activation"] == "gelu"
    assert bundle.preprocess.mean == (0.1, 0.2, 0.3)
    weights = load_clip(file)
    assert weights.settings[:3] == ("gelu", 4, 4)
    tensors = {k: torch.from_numpy(v) for k, v in towers(shared_dir, *CASES[0])[2].items()}
    ids = torch.arange(77, dtype=torch.int32)[None]
    torch.save({**tensors, "text_model.embeddings.position_ids": ids}, tmp_path / "clip.bin")
    for source in (file, tmp_path / "clip.bin"):
        clip = read_clip(source)
        assert clip.settings.num_heads == 4
        np.testing.assert_array_equal(clip.visual["proj"], weights.visual["proj"])


def renamed(pattern, name):
    return lambda tensors: {re.sub(pattern, name, key): value for key, value in tensors.items()}


def kept(pattern):
    return lambda tensors: {k: v for k, v in tensors.items() if re.search(pattern, k)}


def changed(pattern, change):
    return lambda tensors: {
        k: change(v) if re.search(pattern, k) else v for k, v in tensors.items()
    }


PATCHES = np.zeros((64, 768), np.float32)
WRONG = {
    "pruned": (renamed("^vision_model", "image_encoder_without_ddp.visual"), "auto-pruned"),
    "narrow MLP": (changed(r"vision.*layers\.1\.mlp\.fc1", lambda v: v[:32]), "c_fc"),
    "no attention": (kept(r"^(?!vision.*layers\.1\.(self_attn|layer_norm1))"), "missing"),
    "resnet": (renamed("^vision_model.", "visual.layer1.0."), "ResNet tower"),
    "no image": (kept("^text_m"), "the text tower alone"),
    "no text": (kept("^vision"), "the image tower alone"),
    "naflex": (changed(r"patch_embedding\.weight", lambda v: v.reshape(len(v), -1)), "NaFlex"),
    "naflex of timm": (lambda t: {"visual.trunk.embeds.proj.weight": PATCHES, **t}, "NaFlex"),
    "timm": (renamed("^vision_model", "blocks.0"), "timm"),
    "vocabulary": (changed("token_emb", lambda v: v[:512]), "49408 rows"),
    "no settings": (dict, "activation: expected"),
    "broken settings": (dict, "config.json", "{"),
    "a list": (dict, "config.json", "[]"),
    "another type": (dict, "siglip2", {"model_type": "siglip2"}),
    "default sizes": (dict, "width 768 with 12 blocks", {"vision_config": {}}),
    "a tower of a list": (dict, "config.json", {"text_config_dict": [1]}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_models_and_wrong_settings_are_told_in_one_line(shared_dir, kind, tmp_path, capsys):
    change, message, *config = WRONG[kind]
    weights = change(towers(shared_dir, *CASES[0])[2])
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, tmp_path / "m.safetensors")
    for content in config:
        content = content if isinstance(content, str) else json.dumps(CONFIG | content)
        (tmp_path / "config.json").write_text(content)
    clip = ("--clip", tmp_path / "m.safetensors")
    code = run("export", "dense-clip", *clip, "--out", tmp_path / "a.zsseg")
    shown = capsys.readouterr().err
    assert (code, shown.count("\n")) == (1, 1), shown
    assert message in shown


def test_shards_and_heads_of_other_models_are_refused(shared_dir, tmp_path):
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}")
        with refused(CheckpointError, name):
            read_clip(tmp_path / name)
    file = small_file(shared_dir, tmp_path)
    with refused(ArgumentError, "head"):
        head = DenseHead(head="value_mlp", activation="gelu", **HEADS)
        export_clip_file(file, tmp_path / "a.zsseg", head)
    with refused(CheckpointError, "m.safetensors", "PE-Core"):  # training takes a CLIP alone
        load_clip(small_file(shared_dir, tmp_path, "pe"))


def test_a_tokenizer_of_another_size_is_refused(shared_dir, tmp_path):
    file, head = small_file(shared_dir, tmp_path, "siglip"), DenseHead(size_hw=(96, 96), **HEADS)
    place, model = tmp_path / "tokenizer.json", gemma_model()[1]
    for broken in (
        {"vocab": {**model["vocab"], "<more>": 256_000}},
        {"type": "WordPiece"},
        {"vocab": {"<unk>": 1}},
        None,
    ):
        place.unlink()
        if broken is not None:
            place.write_text(json.dumps({"model": model | broken}))
        with refused(CheckpointError, "tokenizer"):
            export_clip_file(file, tmp_path / "a.zsseg", head)


def test_the_activation_of_weights_is_known_by_their_numbers(shared_dir, tmp_path):
    """OpenAI's sizes with weights that float16 holds; other trainers' are of any activation."""
    blocks = {f"transformer.resblocks.{i}.x": np.zeros(1) for i in range(12)}
    text = {"text_projection": np.zeros((1, 512), np.float32)}
    for scale, activation in ((1.0, "quick_gelu"), (1 / 3, None)):
        visual = {"positional_embedding": np.zeros((2, 768)), "conv1.weight": np.full(4, scale)}
        visual = {key: value.astype(np.float32) for key, value in (visual | blocks).items()}
        weights = ClipTensors(visual=Tower(visual), text=Tower(text))
        assert weights.known_activation() == activation
    weights = towers(shared_dir, "tinyclip8m_real_public.npz", "")[2]
    halves = {key: value.astype(np.float16) for key, value in weights.items()}
    save_file(halves, tmp_path / "model.safetensors")
    assert read_clip(tmp_path / "model.safetensors").known_activation() == "gelu"
