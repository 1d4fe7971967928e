"""The training loop's promises: exact resumption; checkpoints that survive, or are refused."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from support.errors import refused
from support.full_disk import disk_with_room_for
from support.toy_training import ToyTask, alike, config, losses_of, toy_batches, train
from zsseg_rt.errors import ArgumentError, CheckpointError, PrecisionNotApplied, TrainingError
from zsseg_rt.training.config import OptimizerConfig
from zsseg_rt.training.loop import is_run
from zsseg_rt.training.loop.checkpointing import CheckpointFolder, read_checkpoint
from zsseg_rt.training.loop.run_state import determinism
from zsseg_rt.training.trained import find_checkpoint

HERE = Path(__file__).parents[1]


def history(folder, key="loss/total"):
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def saved(path, part="model"):
    return getattr(read_checkpoint(path), part)


def same_files(first, second, *parts):
    assert all(alike(saved(first, part), saved(second, part)) for part in parts)


def crash(*_):
    raise EOFError


def acting(act, position):
    """Batches, before that of one position something happens."""

    def source(**place):
        for index, batch in enumerate(toy_batches(**place)):
            if place["start_position"] // 4 + index == position:
                act()
            yield batch

    return source


def test_training_lowers_the_loss_and_leaves_everything(tmp_path):
    settings = config(iterations=60, checkpoint_interval=20, batch_size=64)
    result = train(tmp_path, config=settings, schedule=lambda step: 1.0 - step / 60)
    curve = history(tmp_path, "loss/error")
    assert curve[60] < 0.7 * curve[1]
    assert (result.finished, result.step) == (True, 60)
    assert result.best_checkpoint == result.last_checkpoint
    written = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert written == ["step-00000040.pt", "step-00000060.pt"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["timing"]["steps"], summary["timing"]["pictures"]) == (60, 60 * 64)
    assert summary["losses"].keys() == {"error", "size"}
    assert history(tmp_path, "learning_rate")[31] == pytest.approx(0.5e-2)  # the 31st step's
    assert history(tmp_path, "learning_rate/1")[31] == pytest.approx(0.5e-3)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_resumed_run_is_the_uninterrupted_run_to_the_bit(tmp_path, accumulation_steps):
    settings = config(accumulation_steps=accumulation_steps)
    whole = train(tmp_path / "whole", ToyTask(dropout=0.5), config=settings)
    source = acting(crash, 4 * accumulation_steps)
    with pytest.raises(EOFError):
        train(tmp_path / "parts", ToyTask(dropout=0.5), config=settings, source=source)
    torch.rand(7)  # the generator's state is the checkpoint's, not this process's
    task = ToyTask(dropout=0.5, seed=1)
    parts = train(tmp_path / "parts", task, config=settings, resume=True)
    first, second = (read_checkpoint(run.last_checkpoint, mmap=True) for run in (whole, parts))
    assert alike(first, second)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")
    assert torch.equal(task.extra, first.task["extra"])


def test_evaluation_draws_no_number_that_training_would(tmp_path):
    plain = train(tmp_path / "plain", ToyTask(dropout=0.5))
    watched = train(
        tmp_path / "watched",
        ToyTask(dropout=0.5),
        config=config(evaluation_interval=1),
        evaluate=lambda model: {"score": float(torch.rand(1))},
    )
    same_files(plain.last_checkpoint, watched.last_checkpoint, "model")


def test_accumulation_equals_the_larger_batch(tmp_path):
    whole = train(tmp_path / "whole", config=config())
    parts = train(tmp_path / "parts", config=config(accumulation_steps=4))
    first, second = saved(whole.last_checkpoint), saved(parts.last_checkpoint)
    for key in first:  # float32 sums in another order, through 6 steps of AdamW
        torch.testing.assert_close(first[key], second[key], atol=1e-5, rtol=1e-5)
    assert history(tmp_path / "whole")[6] == pytest.approx(history(tmp_path / "parts")[6], rel=1e-5)


def work(name, folder, **place):
    """A function of support.toy_training in a process of its own."""
    paths = {"PYTHONPATH": f"{HERE.parent}:{HERE}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "support.toy_training", name, str(folder)],
        env=os.environ | paths | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_train_as_one_and_stop_together_on_a_bad_loss(tmp_path):
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        work("work_in_two_processes", tmp_path, **place, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    train(tmp_path / "one")
    one, two = history(tmp_path / "one"), history(tmp_path / "run")
    assert one.keys() == two.keys()
    for step, loss in one.items():  # float32 means of halves instead of one mean
        assert two[step] == pytest.approx(loss, rel=1e-5)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_processes"] == 2
    # and the checkpoint of two processes continues on one
    assert train(tmp_path / "run", config=config(iterations=8), resume=True).step == 8
    # the mean of their losses is that of the whole batch
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    means = [sum(pair) / 2 for pair in zip(*parts, strict=True)]
    assert means == pytest.approx(losses_of(slice(None)), rel=1e-5)
    assert parts[0] != pytest.approx(parts[1], rel=0.1)
    assert "".join(outputs).count("loss: expected finite terms") == 2
    assert "picture-18, picture-19" in "".join(outputs)
    assert CheckpointFolder(tmp_path / "bad" / "checkpoints").steps() == [3]


def test_a_kill_loses_at_most_one_interval(tmp_path):
    """In the middle of writing a checkpoint."""
    assert work("train_and_die_in_save", tmp_path).wait(timeout=180) == -signal.SIGKILL
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [3]
    result = train(tmp_path, resume=True)
    whole = train(tmp_path / "whole")
    same_files(whole.last_checkpoint, result.last_checkpoint, "model", "optimizer")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []
    assert history(tmp_path) == history(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_ends_the_run(tmp_path, number):
    before = signal.getsignal(number)
    result = train(tmp_path, source=acting(lambda: signal.raise_signal(number), 4))
    assert (result.finished, result.step) == (False, 5)
    assert signal.getsignal(number) == before
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [3, 5]
    train(tmp_path, resume=True)
    whole = train(tmp_path / "whole")
    same_files(whole.last_checkpoint, tmp_path / "checkpoints/step-00000006.pt", "model")


def test_nan_loss_stops_and_names_pictures_terms_and_checkpoint(tmp_path):
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, ToyTask(bad_image="picture-17"))
    message = str(caught.value)
    assert "error = nan, size = " in message
    assert "in step 5 for the images picture-16, picture-17, picture-18, picture-19" in message
    assert f"last good checkpoint is {tmp_path / 'checkpoints/step-00000003.pt'}" in message
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [3]
    with refused(TrainingError, "loss"):
        train(tmp_path / "saving", ToyTask(bad_image="picture-9"))  # in the step of a checkpoint
    task = ToyTask()
    task.register_buffer("broken", torch.tensor([0.0, float("inf")]))
    with refused(TrainingError, "weights"):
        train(tmp_path / "saving", task)
    assert CheckpointFolder(tmp_path / "saving" / "checkpoints").steps() == []


def test_cudnn_is_given_back_and_left_alone_otherwise():
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=False, benchmark=True, allow_tf32=False):
        with determinism(True):
            assert not any((cudnn.benchmark, cudnn.enabled, cudnn.allow_tf32))
        assert cudnn.benchmark


@pytest.mark.parametrize("size", [8_000, 16_000])
def test_a_checkpoint_that_cannot_be_written_keeps_the_last_and_says_so(tmp_path, size):
    train(tmp_path, config=config(iterations=3))
    message = "step-00000006.pt: .*File too large.*step-00000003.*--resume"
    with disk_with_room_for(size), pytest.raises(TrainingError, match=message):
        train(tmp_path, resume=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.pt"]
    assert train(tmp_path, resume=True).finished


def test_keeps_the_best_checkpoint_besides_the_last(tmp_path):
    scores = iter([0.2, 0.9, float("nan"), 0.5, 0.9, 0.1])
    result = train(
        tmp_path,
        config=config(evaluation_interval=1, keep_checkpoints=1, kept_steps=(4,)),
        evaluate=lambda model: {"score": next(scores), "other": 1.0},
    )
    assert result.best_step == 2
    assert result.metrics == {"score": 0.9, "other": 1.0}
    assert result.best_checkpoint == tmp_path / "checkpoints/step-00000002.pt"
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [2, 4, 6]
    assert history(tmp_path, "evaluation/score")[4] == 0.5


def test_evaluation_that_was_missed_is_made_up_for(tmp_path):
    def judge(model):
        modes.append(model.training)
        return {"score": 0.5}

    def preview(model, count):
        return [("street", torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())] * count

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings, modes = config(evaluation_interval=3, num_pictures=1), []
    with pytest.raises(EOFError):
        train(tmp_path, config=settings, evaluate=crash)
    train(tmp_path, config=settings, evaluate=judge, preview=preview, resume=True)
    assert modes == [False, False]
    report = json.loads((tmp_path / "evaluations.json").read_text())
    assert report["evaluations"] == {"3": {"score": 0.5}, "6": {"score": 0.5}}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss/error")] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in events.Scalars("evaluation/score")] == [0.5, 0.5]
    assert [e.step for e in events.Images("predictions/street")] == [3, 6]


def test_bfloat16_trains_and_float16_is_refused_on_a_cpu(tmp_path):
    result = train(tmp_path / "low", config=config(precision="bfloat16"))
    full = train(tmp_path / "full")
    low, exact = saved(result.last_checkpoint), saved(full.last_checkpoint)
    assert all(tensor.dtype == torch.float32 for tensor in low.values())
    assert not torch.equal(low["0.weight"], exact["0.weight"])  # it did compute in bfloat16
    with refused(PrecisionNotApplied, "precision"):
        train(tmp_path / "half", config=config(precision="float16"))


def test_gradients_are_cut_down(tmp_path):
    free = train(tmp_path / "free", config=config(iterations=1))
    settings = OptimizerConfig(max_grad_norm=1e-9, eps=1e-3)
    cut = train(tmp_path / "cut", ToyTask(), config=config(iterations=1), optimizer=settings)
    start = ToyTask().model.state_dict()["0.weight"]
    moved = saved(free.last_checkpoint)["0.weight"] - start
    stayed = saved(cut.last_checkpoint)["0.weight"] - start * (1 - 1e-2 * 0.01)
    assert moved.abs().max() > 5e-3
    assert stayed.abs().max() < 1e-6


def test_another_run_is_neither_overwritten_nor_resumed(tmp_path):
    train(tmp_path, config=config(iterations=3))
    with refused(ArgumentError, "run_folder", "--resume"):
        train(tmp_path)
    other = ToyTask()
    other.model[0] = torch.nn.Linear(4, 8)
    with refused(CheckpointError, None, "step-00000003"):
        train(tmp_path, other, resume=True)
    with refused(ArgumentError, "batch_size"):
        train(tmp_path, config=config(batch_size=8), resume=True)
    for change in ({"iterations": 0}, {"seed": -1}, {"batch_size": 8, "accumulation_steps": 3}):
        with refused(ArgumentError, next(iter(change))):
            config(**change).part_size(2)


LAST = "checkpoints/step-00000003.pt"


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    train(folder, config=config(iterations=3, kept_steps=(1,)))
    return folder


@pytest.fixture
def run_to_damage(toy_run, tmp_path):
    return shutil.copytree(toy_run, tmp_path / "run")


def test_any_damage_is_refused_or_changes_nothing(toy_run, tmp_path):
    whole, content = read_checkpoint(toy_run / LAST), (toy_run / LAST).read_bytes()
    draw, path, refusals = random.Random(0), tmp_path / "step-00000003.pt", 0
    for count in range(200):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            tensors = read_checkpoint(path, mmap=count % 2 == 0)
        except CheckpointError as error:
            refusals += "step-00000003.pt: expected" in str(error)
        else:
            assert alike(tensors, whole)
    assert refusals > 130  # the rest hit padding between records
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
        ({"model": {"0.weight": [1.0]}, "model_card": None}, "got others: model, model_card"),
        ({"step": "3", "losses": {"error": "0.1"}}, "got others: step, losses"),
        ({"extra": 1}, "expected step, .*, got .*extra"),
        ({"optimizer": {"state": {}, "param_groups": [{}]}}, "expected states of this task's"),
        ({"optimizer": {}}, "expected states of this task's optimizer"),
        ({"random": [{"torch": torch.zeros(3)}]}, "Python's generators, got others"),
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


def test_a_process_without_a_random_state_is_told(run_to_damage, caplog):
    content = torch.load(run_to_damage / LAST, weights_only=True) | {"random": []}
    torch.save(content, run_to_damage / LAST)
    assert train(run_to_damage, resume=True).finished
    assert "no random state of process 0" in caplog.text


def test_a_checkpoint_is_known_by_what_it_says_of_itself(toy_run, tmp_path):
    shutil.copy(toy_run / LAST, tmp_path / "best.pt")
    torch.save({"model": {}}, tmp_path / "official.pt")
    assert is_run(toy_run)
    assert is_run(tmp_path / "best.pt")
    assert not is_run(tmp_path / "official.pt")
    assert not is_run(tmp_path / "absent")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))  # a few bytes could ask for gigabytes
    with pytest.raises(CheckpointError, match="that torch.save did not write"):
        read_checkpoint(tmp_path / "packed.pt")


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
