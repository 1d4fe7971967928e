"""A checkpoint whose bytes changed after it was saved is refused wherever it is read."""

import json

import pytest

from support.command_line import run
from support.small_runs import SCENES, TABLES, save_clip

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from support.errors import refused  # noqa: E402
from zsseg_rt.errors import CheckpointError  # noqa: E402
from zsseg_rt.training.config import TrainConfig  # noqa: E402
from zsseg_rt.training.loop.checkpointing import CheckpointFolder  # noqa: E402
from zsseg_rt.training.trained.card import load_classes, load_trained  # noqa: E402

TENSORS = [f"{part}.safetensors" for part in ("constants", "model", "optimizer", "random")]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hashes")
    clip = str(save_clip(folder / "clip.safetensors"))
    options = {"pretrained": clip, "activation": "quick_gelu", "image_size": 64}
    tables = TABLES | {
        "model": {"architecture": "zegclip", "options": options},
        "evaluation": {"split": ""},
        "output": {"folder": str(folder / "run")},
    }
    (folder / "run.toml").write_text(TrainConfig.from_dict(tables).to_toml())
    assert run("train", "--config", folder / "run.toml") == 0
    return folder / "run"


@pytest.fixture
def checkpoint(run_folder):
    """A checkpoint's folder, whose files are put back when the test ends."""
    folder = run_folder / "checkpoints/step-00000002"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    yield folder
    for path, content in whole.items():
        path.write_bytes(content)


def flip(path, place=-2):
    """Flip the bit that makes the last number, if it is a float32, very large."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_json(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def without_hashes(folder):
    """Make a checkpoint one of format 2, which listed sizes only."""
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    (folder / "state.json").write_text(json.dumps(state | {"format_version": 2}))


@pytest.mark.parametrize("name", TENSORS)
def test_a_flipped_bit_is_named(checkpoint, name):
    folder = CheckpointFolder(checkpoint.parent)
    assert folder.load(2).state.step == 2
    flip(checkpoint / name)
    message = rf"step-00000002/{name}: expected SHA-256 \w+, got \w+: the file was changed .* Copy"
    with pytest.raises(CheckpointError, match=message):
        folder.load(2)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.json", {"classes": None}),
        ("state.json", {"losses": {}}),
        ("state.json", {"left_out": {"teacher": "0"}}),
    ],
)
def test_a_changed_value_is_named(checkpoint, name, change):
    change_json(checkpoint / name, change)
    with pytest.raises(CheckpointError, match=rf"step-00000002/{name}: expected SHA-256"):
        CheckpointFolder(checkpoint.parent).load(2)


@pytest.mark.parametrize(
    ("sha256", "message"),
    [
        ({}, "expected constants.safetensors, model.json, .* got none"),
        ({"model.json": "0"}, "expected constants.safetensors, model.json, .* got model.json"),
        ([], "sha256: expected an object"),
        ({"model.json": 1}, "model.json: expected a string"),
    ],
)
def test_missing_hashes_are_named(checkpoint, sha256, message):
    change_json(checkpoint / "state.json", {"sha256": sha256})
    with pytest.raises(CheckpointError, match=rf"state.json.*{message}"):
        load_trained(checkpoint)


def test_only_what_is_read_is_hashed(checkpoint):
    flip(checkpoint / "optimizer.safetensors")
    load_trained(checkpoint)
    load_classes(checkpoint)


def test_no_command_takes_a_damaged_model(run_folder, checkpoint, tmp_path, capsys):
    flip(checkpoint / "model.safetensors")
    config, out = run_folder / "config.toml", tmp_path / "x.zsseg"
    data = ["--dataset", "folder", "--root", SCENES, "--split", "val", "--limit", "2"]
    for command in (
        ["train", "--config", config, "--resume"],
        ["export", "trained", run_folder, "--out", out],
        ["evaluate", run_folder, *data],
    ):
        assert run(*command) == 1
        assert "model.safetensors: expected SHA-256" in capsys.readouterr().err
    assert not out.exists()
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-00000002"]


def test_checkpoints_without_hashes_still_load(run_folder, checkpoint):
    without_hashes(checkpoint)
    change = {"losses": {}}  # which the hash would refuse
    change_json(checkpoint / "state.json", change)
    load_trained(checkpoint)
    assert CheckpointFolder(checkpoint.parent).load(2).state.step == 2
    flip(checkpoint / "optimizer.safetensors")
    assert CheckpointFolder(checkpoint.parent).load(2).state.step == 2


def test_json_that_nests_deeply_is_named(checkpoint):
    (checkpoint / "state.json").write_text("[" * 100_000)
    with refused(CheckpointError, None, "state.json"):
        load_trained(checkpoint)
