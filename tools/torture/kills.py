"""Commands that are killed at random moments, and what they leave behind."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.torture.target import BUNDLES, ROOT, test_support
from zsseg_rt import Bundle
from zsseg_rt.errors import ZssegError

_SHARES = {"segment": 0.4, "export": 0.3, "import-checkpoint": 0.15, "train": 0.15}
COMMANDS = tuple(_SHARES)
_LONGEST = 600.0  # seconds for a command that is not killed


@dataclass
class Ended:
    """The fates of the commands that were killed.

    Attributes:
        kills: Commands that were alive when they were killed.
        too_late: Commands that had ended by then.
        troubles: What was lost, half written, left over or different, one line each.
    """

    kills: int = 0
    too_late: int = 0
    by_command: dict[str, int] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One line for each command, and the troubles."""
        lines = [f"killed: {name} {count} times" for name, count in self.by_command.items()]
        lines.append(
            f"{self.kills} killed, {self.too_late} had ended; troubles: {len(self.troubles)}"
        )
        return "\n".join([*lines, *self.troubles])


@dataclass(frozen=True)
class _Job:
    """A command, how it goes on after a kill, and what must hold then.

    Attributes:
        start: The command; also what is killed.
        go_on: What finishes the work after a kill.
        check: Looks at what a killed command left; yields troubles.
        result: The finished work, as hashes by file name.
    """

    name: str
    start: list[str]
    go_on: list[str]
    check: Callable[[], Iterator[str]]
    result: Callable[[], dict[str, str]]
    clear: Callable[[], None]


def kill_many(
    folder: Path, seed: int, count: int, ended: Ended, names: Sequence[str] = COMMANDS
) -> None:
    """Kill so many commands, finish the work of each, and compare.

    Args:
        folder: For everything that they write.
        seed: Of the moments.
        count: Kills of all commands together, about; every third work is killed twice.
        ended: What came of it, counted as it comes.
        names: Which commands, of :data:`COMMANDS`.
    """
    folder.mkdir(parents=True)
    shares = sum(_SHARES[name] for name in names)
    for name in names:
        draw = random.Random(f"{seed} kills {name}")
        works = max(1, round(count * _SHARES[name] / shares * 3 / 4))
        _kill_one_job(_MAKERS[name](folder), folder, works, draw, ended)


def _kill_one_job(job: _Job, folder: Path, count: int, draw: random.Random, ended: Ended) -> None:
    begin = time.monotonic()
    _finish(job.start, folder)
    seconds = time.monotonic() - begin
    expected = job.result()
    for number in range(count):
        job.clear()
        moment = draw.uniform(0.1, 1.0) * seconds
        for command in (job.start, job.go_on):
            # Every third work is killed twice: at its start and while it goes on.
            if command is job.go_on and number % 3:
                break
            alive = _kill(command, folder, moment)
            ended.kills, ended.too_late = ended.kills + alive, ended.too_late + (not alive)
            ended.by_command[job.name] = ended.by_command.get(job.name, 0) + alive
            where = f"{job.name}, kill {number} after {moment:.2f} s"
            ended.troubles += [f"{where}: {trouble}" for trouble in job.check()]
        _finish(job.go_on, folder)
        result = job.result()
        if result != expected:
            names = sorted(k for k in {*result, *expected} if result.get(k) != expected.get(k))
            ended.troubles.append(f"{where}: other results, {', '.join(names[:5])}")


def _command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "zsseg_rt", *words]


def _environment(folder: Path) -> dict[str, str]:
    home = {"ZSSEG_HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir(exist_ok=True)
    return {**os.environ, **home, "PYTHONPATH": str(ROOT)}


def _finish(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        _command(words), cwd=folder, env=_environment(folder), timeout=_LONGEST,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr[-800:]}")


def _kill(words: list[str], folder: Path, moment: float) -> bool:
    """Kill a command at a moment; whether it was alive then."""
    process = subprocess.Popen(
        _command(words), cwd=folder, env=_environment(folder), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def _segment(folder: Path) -> _Job:
    from PIL import Image

    photos = folder / "in"
    photos.mkdir()
    noise = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(noise.integers(0, 256, (480, 640, 3), np.uint8)).save(
            photos / f"{number}.jpg"
        )
    out = folder / "out"
    words = [
        "segment",
        "in",
        "--demo",
        "scenes",
        "--out",
        "out",
        "--threads",
        "1",
        "--json",
        "report.json",
    ]

    def check() -> Iterator[str]:
        for path in [*out.glob("*.png"), *out.glob("*.jpg")]:
            try:
                with Image.open(path) as image:
                    image.load()
            except OSError as error:
                yield f"half written: {path.name}: {error}"

    return _Job(
        "segment", words, [*words, "--resume"], check,
        lambda: _hashes(out, without=("zsseg_journal.jsonl",)), lambda: _remove(out),
    )  # fmt: skip


def export_words(folder: Path) -> list[str]:
    """``export dense`` of what is written into a folder; ``--out`` is left to add."""
    shutil.copy(BUNDLES / "dense.zsseg" / "image_encoder.float32.onnx", folder / "encoder.onnx")
    (folder / "names.txt").write_text("red\ngreen\n")
    width = Bundle.load(BUNDLES / "dense.zsseg").text.embed_dim
    np.save(folder / "rows.npy", np.eye(2, width, dtype=np.float32))
    words = ["export", "dense", str(folder / "encoder.onnx"), "--size", "32", "--mean", "clip"]
    return [*words, "--bank", str(folder / "names.txt"), str(folder / "rows.npy")]


def _export(folder: Path) -> _Job:
    words = [*export_words(folder), "--overwrite", "--out", "dense.zsseg"]
    return _bundle_job("export", words, folder)


def _import(folder: Path) -> _Job:
    import torch

    tiny = test_support("tiny")
    sizes = tiny.TinySizes(width=64, num_heads=1, embed_dim=64, decoder_heads=8, text_heads=1,
                           num_layers=1, text_layers=1)  # fmt: skip
    torch.save({"state_dict": tiny.zegclip_state_dict(sizes)}, folder / "official.pth")
    words = [
        "import-checkpoint",
        "zegclip",
        "official.pth",
        "--overwrite",
        "--precision",
        "float32",
    ]
    return _bundle_job("import-checkpoint", [*words, "--out", "zegclip.zsseg"], folder)


def _bundle_job(name: str, words: list[str], folder: Path) -> _Job:
    place = folder / words[words.index("--out") + 1]

    def check() -> Iterator[str]:
        """Whatever happened, the bundle of the run before is there, or the new one."""
        try:
            Bundle.load(place).verify()
        except ZssegError as error:
            yield f"no whole bundle: {error}"

    def result() -> dict[str, str]:
        left = {path.name: "left over" for path in folder.glob(f".{place.stem}*")}
        # The manifest holds the moment of the export.
        return _hashes(place, without=("bundle.json",)) | left

    return _Job(name, words, words, check, result, lambda: None)


def _train(folder: Path) -> _Job:
    from tools.torture.small_run import write_settings
    from zsseg_rt.torch_files.checkpoints import hash_tensors
    from zsseg_rt.training.loop.checkpointing import read_checkpoint

    settings = write_settings(folder / "training", iterations=12, interval=2)
    run = folder / "training/run"
    words = ["train", "-c", str(settings)]

    def result() -> dict[str, str]:
        last = sorted((run / "checkpoints").glob("step-*"))[-1]
        hidden = {p.name: "left over" for p in run.rglob(".*") if "lock" not in p.name}
        return {last.name: hash_tensors(read_checkpoint(last).model)} | hidden

    def check() -> Iterator[str]:
        for path in (run / "checkpoints").glob("step-*"):
            try:
                read_checkpoint(path, mmap=True)
            except ZssegError as error:
                yield f"half written: {error}"

    return _Job(
        "train", words, [*words, "--resume"], check, result, lambda: _remove(run)
    )  # fmt: skip


_MAKERS = {"segment": _segment, "export": _export, "import-checkpoint": _import, "train": _train}


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hashes(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): _hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }
