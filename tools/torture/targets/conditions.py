"""Sound input under bad conditions: a full disk, one cache for many, forks, threads, long runs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.torture.damage import spoil_bytes
from tools.torture.kills import export_words
from tools.torture.target import Attempt, RefusedError, target
from tools.torture.targets.bundles import CONFIG
from tools.torture.targets.values import OPERATIONS, sound_call
from zsseg_rt import Bundle, Engine, ops
from zsseg_rt.errors import ZssegError

WORDS = (("red ball", "blue sky"), ("yellow wall", "grey floor", "red ball"))
_CLONE_NEWNS = 0x20000
_DISK_BYTES = 4 << 20
_MOST_GROWTH = 48 << 20  # bytes of a process that labels on and on; a leak gets there in time
_ANSWERS_WITHIN = 25.0  # seconds for a forked process


def can_mount() -> bool:
    """Whether this process may have a disk of its own, which the full one has to be."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


@target("full-disk", "photos, reports, bundles and caches on a disk that becomes full",
        group="disk")  # fmt: skip
def _full_disk(folder: Path) -> Attempt:
    from PIL import Image

    disk = _own_disk(folder)
    noise = np.random.default_rng(0)
    (folder / "in").mkdir(exist_ok=True)
    for number in range(3):
        image = noise.integers(0, 256, (120, 160, 3), np.uint8)
        Image.fromarray(image).save(folder / "in" / f"{number}.png")
    export = [*export_words(folder), "--out", str(disk / "x.zsseg")]
    segment = ["segment", str(folder / "in"), "--demo", "scenes", "--threads", "1", "--out"]
    segment += [str(disk / "out"), "--json", str(disk / "report.json")]

    def attempt(draw: random.Random) -> None:
        for entry in disk.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        words = draw.choice((segment, segment, export))
        room = int(2 ** draw.uniform(8, 21))
        (disk / "filler").write_bytes(bytes(max(_free(disk) - room, 0)))
        code, complained = _command(words)
        _check_disk(disk, whole=code == 0)
        if code:
            if "Traceback" in complained or not complained.strip():
                raise AssertionError(f"{words}: exit code {code}: {complained[-400:]}")
            raise RefusedError(complained[-200:])

    return attempt


def _own_disk(folder: Path) -> Path:
    """A disk of 4 MB that goes with this process; no other process sees it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise RuntimeError(f"no mounts of its own: {os.strerror(ctypes.get_errno())}")
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", disk], check=True)
    return disk


def _free(disk: Path) -> int:
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize


def _command(words: list[str]) -> tuple[int, str]:
    from zsseg_rt import cli

    complained = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(complained):
        code = cli.main(words)
    return code, complained.getvalue()


def _check_disk(disk: Path, *, whole: bool) -> None:
    """Every file is whole: pictures can be read, bundles verified, nothing is half written."""
    from PIL import Image

    (disk / "filler").unlink()
    for picture in (disk / "out").glob("*.png"):
        with Image.open(picture) as image:
            image.load()
    bundle = disk / "x.zsseg"
    if bundle.exists():
        Bundle.load(bundle).verify()
    left = [path.name for path in disk.rglob("*") if path.name.startswith(".")]
    if left:
        raise AssertionError(f"left over: {', '.join(left[:5])}")
    if whole and not (bundle.exists() or len(list((disk / "out").glob("*.png"))) == 6):
        raise AssertionError("exit code 0 without results")


def _labels(cache: Path, words: tuple[str, ...]) -> bytes:
    config = replace(CONFIG, use_cache=True, cache_dir=cache)
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    with Engine(Bundle.demo("scenes"), config) as engine:
        engine.set_classes(words)
        return engine.segment(frame).labels.tobytes()


@target("shared-cache", "three processes use one cache at once, empty, damaged or as it was",
        group="cache")  # fmt: skip
def _shared_cache(folder: Path) -> Attempt:
    cache = folder / "cache"
    expected = {words: _labels(folder / "another", words) for words in WORDS}
    # Ended with this process's group; a started one is not a fork, which OpenVINO does not survive.
    pool = multiprocessing.get_context("spawn").Pool(3)

    def attempt(draw: random.Random) -> None:
        kind = draw.randrange(3)
        if kind == 0:
            shutil.rmtree(cache, ignore_errors=True)
        entries = sorted(path for path in cache.rglob("*") if path.is_file())
        for entry in entries if kind == 1 else ():
            entry.write_bytes(spoil_bytes(entry.read_bytes(), draw))
        asked = [draw.choice(WORDS) for _ in range(3)]
        try:
            labels = pool.starmap(_labels, [(cache, words) for words in asked])
        except ZssegError as error:
            raise AssertionError(f"a shared cache ended an engine: {error}") from error
        if labels != [expected[words] for words in asked]:
            raise AssertionError("a shared cache changed labels")

    return attempt


@target("fork", "operations in a process and in its fork, which may come amid another thread's",
        group="fork")  # fmt: skip
def _fork(_: Path) -> Attempt:
    pool = ThreadPoolExecutor(1)

    def attempt(draw: random.Random) -> None:
        call = _large_call(draw)
        expected = _flat(call())
        other = pool.submit(call) if draw.random() < 0.5 else None
        child = os.fork()
        if child == 0:
            os._exit(0 if _same(_flat(call()), expected) else 3)
        try:
            code = _exit_code(child)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if other is not None:
            other.result()
        if code or not _same(_flat(call()), expected):
            raise AssertionError(f"the forked process ended with {code}")

    return attempt


def _large_call(draw: random.Random) -> partial[Any]:
    """An operation on as much as its threads share."""
    noise, sides = np.random.default_rng(draw.getrandbits(32)), (240, draw.choice((320, 333)))
    frame = noise.integers(0, 256, (*sides, 3), np.uint8)
    kind = draw.randrange(3)
    if kind == 0:
        logits = noise.standard_normal((1, 9, 30, 40)).astype(np.float32)
        return partial(ops.upsample_argmax, logits, sides)
    if kind == 1:
        size = {"size_hw": (224, 224), "mean": [0.5] * 3, "std": [0.2] * 3}
        return partial(ops.preprocess, frame, **size)
    colours = noise.integers(0, 256, (256, 3), np.uint8)
    return partial(ops.overlay, frame, frame[..., 0].copy(), colours, alpha=0.5)


def _exit_code(child: int) -> int:
    end = time.monotonic() + _ANSWERS_WITHIN
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    raise AssertionError(f"the forked process gave no answer within {_ANSWERS_WITHIN:.0f} s")


def _sound_call(draw: random.Random) -> partial[Any]:
    name = draw.choice(OPERATIONS)
    arrays, settings = sound_call(name, draw)
    return partial(getattr(ops, name), **arrays, **settings)


def _flat(result: Any) -> list[Any]:
    """The arrays and numbers of an operation's result."""
    parts = result if isinstance(result, tuple) else (result,)
    return [np.array(part) for part in parts if part is not None]


def _same(actual: list[Any], expected: list[Any]) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(actual, expected, strict=True))


@target("threads", "four threads label, change classes and call operations at once",
        group="threads")  # fmt: skip
def _threads(_: Path) -> Attempt:
    engine = Engine(Bundle.demo("scenes"), replace(CONFIG, num_lanes=3))
    frames = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), np.uint8)
    expected: dict[tuple[str, ...], list[bytes]] = {}
    for words in WORDS:
        engine.set_classes(words)
        expected[words] = [engine.segment(frame).labels.tobytes() for frame in frames]
    pool = ThreadPoolExecutor(4)

    def act(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(4):
            kind = draw.randrange(4)
            if kind == 0:
                engine.set_classes(draw.choice(WORDS))
            elif kind == 1:
                _sound_call(draw)()
            else:
                _label(engine, draw.randrange(4), frames, expected, by_lane=kind == 2)

    def attempt(draw: random.Random) -> None:
        done = [pool.submit(act, draw.getrandbits(32)) for _ in range(4)]
        for future in done:
            future.result()

    return attempt


def _label(
    engine: Engine, number: int, frames: Any, expected: dict[Any, list[bytes]], *, by_lane: bool
) -> None:
    """Label a frame; refusals of an engine or a lane that is in use are part of the contract."""
    try:
        with engine.lane() if by_lane else contextlib.nullcontext(engine) as labeller:
            seg = labeller.segment(frames[number])
    except ZssegError:
        return
    if seg.labels.tobytes() not in [labels[number] for labels in expected.values()]:
        raise AssertionError(f"labels of frame {number} are those of no vocabulary")


@target("many-frames", "2000 frames a case on and on: memory stays as it was", group="frames")
def _many_frames(_: Path) -> Attempt:
    engine = Engine(Bundle.demo("scenes"), CONFIG)
    engine.set_classes(WORDS[0])
    frames = np.random.default_rng(0).integers(0, 256, (7, 24, 32, 3), np.uint8)
    for frame in _endless(frames, 400):
        engine.segment(frame)
    before = _resident()

    def attempt(draw: random.Random) -> None:
        for number, frame in enumerate(_endless(frames, 2000)):
            if number % 500 == 0:
                engine.set_classes(draw.choice(WORDS))
            engine.segment(frame)
        gc.collect()
        if (grown := _resident() - before) > _MOST_GROWTH:
            raise AssertionError(f"{grown >> 20} MB more than after 400 frames")

    return attempt


def _endless(frames: Any, count: int) -> Iterator[Any]:
    for number in range(count):
        yield frames[number % len(frames)]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
