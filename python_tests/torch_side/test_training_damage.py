"""A damaged checkpoint is refused by the name of its file, and no other is taken instead."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file  # noqa: E402

from support.errors import refused  # noqa: E402
from support.toy_training import config, train  # noqa: E402
from zsseg_rt.errors import CheckpointError  # noqa: E402

MODEL = "model.safetensors"


@pytest.fixture
def run_to_damage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    train(folder, config=config(iterations=3, kept_steps=(1,)))
    return folder


def without_hashes(state):
    """A state of format 2, which had none."""
    return {key: value for key, value in state.items() if key != "sha256"} | {"format_version": 2}


def test_damaged_checkpoint_is_named(run_to_damage):
    last = run_to_damage / "checkpoints/step-00000003"
    content = (last / MODEL).read_bytes()
    (last / MODEL).write_bytes(content[:-1])
    with refused(CheckpointError, None, "model.safetensors"):
        train(run_to_damage, resume=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "expected a file of a training checkpoint, got No such file"),
        ("", "expected a file of a training checkpoint, got Expecting value"),
        ("[1]", "expected a JSON object, got list"),
        ({"files": ...}, "missing key 'files'"),
        ({"files": [1]}, "files: expected an object, got .1."),
        ({"files": {}}, "files: expected model.safetensors and some of .* got none"),
        ({"files": {"model.safetensors": "1"}}, "files.model.safetensors: expected an integer"),
        ({"files": {"model.safetensors": 1, "../x.safetensors": 1}}, "files: expected model.saf"),
        ({"step": "3"}, "step: expected an integer, got '3'"),
        ({"step": -1}, "step: expected at least 0, got -1"),
        ({"step": 2}, "expected step 3, got 2"),
        ({"batch_size": ...}, "missing key 'batch_size'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"losses": {"error": "small"}}, "losses.error: expected a number"),
        ({"optimizer": {"groups": 1}}, "optimizer.groups: expected a list"),
        ({"optimizer": {"groups": [{}], "values": {}}}, "optimizer: expected the parameter gro"),
        ({"optimizer": {"groups": [{}, {}], "values": {}}}, "optimizer: expected the paramete"),
        ({"format_version": 4}, "expected format_version 1 to 3, got 4"),
        ({"format_version": ...}, "expected format_version 1 to 3, got None"),
        ({"format_version": [2]}, r"expected format_version 1 to 3, got \[2\]"),
    ],
)
def test_damaged_state_is_named_and_nothing_else_is_taken(run_to_damage, damage, message):
    run = run_to_damage
    last = run / "checkpoints/step-00000003"
    path = last / "state.json"
    if damage is None:
        path.unlink()
    elif isinstance(damage, str):
        path.write_text(damage)
    else:
        content = without_hashes(json.loads(path.read_text())) | damage
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    with pytest.raises(CheckpointError, match=f"step-00000003.*{message}.*[.]$") as caught:
        train(run, resume=True)
    assert any(word in str(caught.value) for word in ("remove", "Use the version"))
    assert not (run / "checkpoints/step-00000006").exists()
    shutil.rmtree(last)
    assert train(run, resume=True).finished  # from step 1, as the message says


@pytest.mark.parametrize("change", [{"0.torch": torch.zeros(3)}, {"0.numpy": None}])
def test_damaged_random_state_is_named(run_to_damage, change):
    last = run_to_damage / "checkpoints/step-00000003"
    states = load_file(last / "random.safetensors") | change
    kept = {name: state for name, state in states.items() if state is not None}
    save_file(kept, last / "random.safetensors")
    state = without_hashes(json.loads((last / "state.json").read_text()))
    state["files"]["random.safetensors"] = (last / "random.safetensors").stat().st_size
    (last / "state.json").write_text(json.dumps(state))
    with refused(CheckpointError, None, "step-00000003"):
        train(run_to_damage, resume=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"evaluations": {"3": {"score": "high"}}}'])
def test_damaged_evaluations_are_named(run_to_damage, content):
    (run_to_damage / "evaluations.json").write_text(content)
    with refused(CheckpointError, None, "evaluations.json"):
        train(run_to_damage, resume=True)
