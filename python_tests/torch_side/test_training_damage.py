"""A damaged checkpoint is refused by the name of its file, and no other is taken instead."""

import random
import shutil
import zipfile

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from support.errors import refused  # noqa: E402
from support.toy_training import alike, config, train  # noqa: E402
from zsseg_rt.errors import CheckpointError  # noqa: E402
from zsseg_rt.training.loop import is_run  # noqa: E402
from zsseg_rt.training.loop.checkpointing import read_checkpoint  # noqa: E402
from zsseg_rt.training.trained import find_checkpoint  # noqa: E402

LAST = "checkpoints/step-00000003.pt"


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    train(folder, config=config(iterations=3, kept_steps=(1,)))
    return folder


@pytest.fixture
def run_to_damage(toy_run, tmp_path):
    return shutil.copytree(toy_run, tmp_path / "run")


@pytest.mark.parametrize("seed", range(4))
def test_any_flipped_bit_is_refused_or_changes_nothing(toy_run, tmp_path, seed):
    whole, content = read_checkpoint(toy_run / LAST), (toy_run / LAST).read_bytes()
    draw, path, refusals = random.Random(seed), tmp_path / "step-00000003.pt", 0
    for count in range(60):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            found = read_checkpoint(path, mmap=count % 2 == 0)
        except CheckpointError as error:
            refusals += "step-00000003.pt: expected" in str(error)
        else:
            assert alike(found, whole)
    assert refusals > 40  # the rest hit padding between records


def test_any_truncation_is_refused(toy_run, tmp_path):
    content, path = (toy_run / LAST).read_bytes(), tmp_path / "step-00000003.pt"
    for size in (*range(0, len(content), 997), len(content) - 1):
        path.write_bytes(content[:size])
        with refused(CheckpointError, None, "step-00000003.pt"):
            read_checkpoint(path)


class Command:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "got others: step"),
        ({"step": 2}, "expected step 3, got 2"),
        ({"batch_size": 0}, "got others: batch_size"),
        ({"losses": {"error": "small"}}, "got others: losses"),
        ({"model": {"0.weight": [1.0]}}, "got others: model"),
        ({"task": None}, "got others: task"),
        ({"extra": 1}, "got others: .*extra"),
        ({"optimizer": {"state": {}, "param_groups": [{}]}}, "expected the parameter groups"),
        ({"optimizer": {}}, "optimizer: expected the parameter groups"),
        ({"random": [{"torch": torch.zeros(3)}]}, "expected the states of process 0's generators"),
        ({"format_version": 5}, "expected format_version 4, got 5.* Use the version"),
        ({"format": "another"}, "expected a checkpoint of zsseg-rt train, got another file"),
        ({"losses": Command()}, "expected a whole checkpoint, got .*"),
    ],
)
def test_other_content_is_refused_and_nothing_else_is_taken(run_to_damage, change, message, capfd):
    content = torch.load(run_to_damage / LAST, weights_only=True)
    torch.save(content | change, run_to_damage / LAST)
    with pytest.raises(CheckpointError, match=f"(?s)step-00000003.pt.*{message}.*[.]$"):
        train(run_to_damage, resume=True)
    assert "run\n" not in capfd.readouterr().out
    assert not (run_to_damage / "checkpoints/step-00000006.pt").exists()
    (run_to_damage / LAST).unlink()
    assert train(run_to_damage, resume=True).finished  # from step 1, as the message says


def test_packed_records_are_refused(run_to_damage):
    """A few kilobytes could otherwise ask for gigabytes."""
    path = run_to_damage / LAST
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="that torch.save did not write"):
        read_checkpoint(path)


def test_a_checkpoint_is_known_by_what_it_says_of_itself(toy_run, tmp_path):
    shutil.copy(toy_run / LAST, tmp_path / "best.pt")
    torch.save({"model": {}}, tmp_path / "official.pt")
    assert is_run(toy_run)
    assert is_run(tmp_path / "best.pt")
    assert not is_run(tmp_path / "official.pt")
    assert not is_run(tmp_path / "absent")


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 100_000, '{"evaluations": {"3": {"score": "high"}}}']
)
def test_damaged_evaluations_are_named(run_to_damage, content):
    (run_to_damage / "evaluations.json").write_text(content)
    with refused(CheckpointError, None, "evaluations.json"):
        train(run_to_damage, resume=True)
    content = '{"best_metric": {}, "evaluations": {"1": {"score": 0.5}}}'
    (run_to_damage / "evaluations.json").write_text(content)  # by what is no name
    assert find_checkpoint(run_to_damage) == run_to_damage / LAST
