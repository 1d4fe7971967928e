"""A run's bundle says whose space its embeddings live in, not whose it usually is."""

import hashlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from support import tiny  # noqa: E402
from support.command_line import run  # noqa: E402
from support.small_runs import SIZES, TABLES, save_clip  # noqa: E402
from tools.scenes.words import CLASS_NAMES  # noqa: E402
from zsseg_rt.bundles.bundle import Bundle  # noqa: E402
from zsseg_rt.torch_files import clip_arrays  # noqa: E402
from zsseg_rt.torch_files.clip_arrays import describe_space  # noqa: E402
from zsseg_rt.training.assembly import (  # noqa: E402
    assemble,
    text_space,
    train,
)
from zsseg_rt.training.config import ModelConfig, TextConfig, TrainConfig  # noqa: E402
from zsseg_rt.training.trained import export_trained  # noqa: E402


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny.safetensors")


def start_of_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def settings(clip_file, folder, **tables):
    options = {"pretrained": str(clip_file), "activation": "quick_gelu", "image_size": 64}
    model = {"options": options | {"num_prompts": 2}}
    output = {"output": {"folder": str(folder)}, "evaluation": {"split": ""}}
    return TrainConfig.from_dict(TABLES | {"model": model} | output | tables)


@pytest.mark.parametrize(
    ("tag", "architecture", "space"),
    [
        ("openai", "ViT-B-16", "OpenAI CLIP ViT-B/16"),
        ("openai", "ViT-B-16-quickgelu", "OpenAI CLIP ViT-B/16"),
        ("openai", "ViT-L-14-336", "OpenAI CLIP ViT-L/14@336px"),
        ("openai", "RN50", "OpenAI CLIP RN50"),
        ("laion2b_s34b_b88k", "ViT-B-16", "CLIP ViT-B-16 laion2b_s34b_b88k"),
    ],
)
def test_tags_say_which_clip_it_is(tag, architecture, space):
    assert describe_space(tag, architecture) == space
    text = TextConfig(clip=tag, clip_architecture=architecture)
    assert text_space(text, ModelConfig(options={"pretrained": "other"})) == space
    model = ModelConfig(options={"pretrained": tag, "clip": architecture})
    assert text_space(TextConfig(), model) == space


def test_a_tag_alone_is_the_builders_own_architecture():
    options = {"pretrained": "openai"}
    assert text_space(TextConfig(), ModelConfig(options=options)) == "OpenAI CLIP ViT-B/16"
    student = ModelConfig(architecture="zeroseg", options=options)
    assert text_space(TextConfig(), student) == "OpenAI CLIP ViT-L/14"
    assert text_space(TextConfig(), ModelConfig()) == ""


def test_openais_own_file_is_known(tmp_path, monkeypatch):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"CLIP")
    assert describe_space(file) == f"CLIP weights.pt (SHA-256 {start_of_hash(file)})"
    digest = hashlib.sha256(b"CLIP").hexdigest()
    monkeypatch.setitem(clip_arrays.OPENAI_FILES, digest, "ViT-B-16")
    assert describe_space(file) == "OpenAI CLIP ViT-B/16"


def test_what_is_told_counts_first_then_the_bank(tmp_path):
    rows = tmp_path / "rows.npy"
    np.save(rows, tiny.text_embeds(len(CLASS_NAMES), 8).numpy())
    model = ModelConfig(options={"pretrained": "openai"})
    told = TextConfig(space="mine", bank=str(rows))
    assert text_space(told, model) == "mine"
    named = text_space(TextConfig(bank=str(rows), clip="openai"), model)
    assert named == f"rows of rows.npy (SHA-256 {start_of_hash(rows)})"


def test_a_runs_bundle_names_its_clip(clip_file, tmp_path, capsys):
    config = settings(clip_file, tmp_path / "run")
    train(config)
    bundle = export_trained(tmp_path / "run", tmp_path / "x.zsseg", precisions=("float32",))
    space = f"CLIP tiny.safetensors (SHA-256 {start_of_hash(clip_file)})"
    assert Bundle.load(bundle).text.space == space
    assert run("info", bundle) == 0
    assert f"text space: {space}" in " ".join(capsys.readouterr().out.split())
    started = settings(clip_file, tmp_path / "b", model={"start_from": str(tmp_path / "run")})
    assert assemble(started).classes.space == space


def test_a_run_that_stated_its_space_can_be_resumed(clip_file, tmp_path):
    told = settings(clip_file, tmp_path / "run", text={"space": "OpenAI CLIP ViT-B/16"})
    train(told)
    assert train(settings(clip_file, tmp_path / "run"), resume=True).finished


def test_exports_of_plain_clip_name_it(clip_file, tmp_path):
    arguments = ["--pretrained", clip_file, "--activation", "quick_gelu", "--size", "64"]
    heads = ["--num-heads", SIZES.num_heads, "--text-heads", SIZES.text_heads]
    out = tmp_path / "d.zsseg"
    assert run("export", "dense-clip", "--out", out, *arguments, *heads) == 0
    assert start_of_hash(clip_file) in Bundle.load(out).text.space
