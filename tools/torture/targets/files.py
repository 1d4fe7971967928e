"""Files that the package reads: checkpoints, settings, journals, caches, reports, runs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tools.torture.damage import odd_text, odd_value, spoil_bytes, spoil_json
from tools.torture.target import Attempt, RefusedError, target
from tools.torture.targets.bundles import CONFIG
from zsseg_rt import Bundle, Engine
from zsseg_rt.common.files import read_npy
from zsseg_rt.errors import ZssegError
from zsseg_rt.integrations.batch import Journal, PhotoResult

MOST = 1 << 20  # bytes of an array


@target("arrays", ".npy files with damaged bytes")
def _arrays(folder: Path) -> Attempt:
    originals = []
    for number, dtype in enumerate(("f4", "f2", "u1", "i8", "U9", "?")):
        path = folder / f"{number}.npy"
        np.save(path, np.ones((3, 5), dtype))
        originals.append(path.read_bytes())

    def attempt(draw: random.Random) -> None:
        content = spoil_bytes(draw.choice(originals), draw)
        try:
            values = read_npy(content, what="rows.npy", max_bytes=MOST)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        if values.nbytes > MOST:
            raise AssertionError(f"read_npy gave {values.nbytes} bytes")

    return attempt


@target("journal", "the list of finished photos that --resume reads")
def _journal(folder: Path) -> Attempt:
    photos = []
    for number in range(4):
        photo = folder / f"{number}.png"
        photo.write_bytes(bytes([number]) * 50)
        photos.append(photo)
    path = folder / "journal.jsonl"
    journal = Journal(path, "key")
    for photo in photos:
        result = PhotoResult(photo=str(photo), overlay=str(photo), mask=str(photo), size_hw=(1, 1))
        journal.append(result, photo.read_bytes())
    content = path.read_bytes()

    def attempt(draw: random.Random) -> None:
        path.write_bytes(spoil_bytes(content, draw))
        again = Journal(path, "key")
        again.read()
        for photo in photos:
            again.finished(photo)

    return attempt


@target("caches", "cached text rows and compiled graphs: damage costs time, never an error")
def _caches(folder: Path) -> Attempt:
    config = replace(CONFIG, use_cache=True, cache_dir=folder / "cache")
    words = ("red ball", "blue sky")
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)

    def run() -> Any:
        with Engine(Bundle.demo("scenes"), config) as engine:
            engine.set_classes(words)
            return engine.segment(frame).labels

    expected = run()

    def attempt(draw: random.Random) -> None:
        entries = sorted(path for path in (folder / "cache").rglob("*") if path.is_file())
        for entry in draw.sample(entries, min(len(entries), draw.choice((1, 1, 3)))):
            entry.write_bytes(spoil_bytes(entry.read_bytes(), draw))
        try:
            labels = run()
        except ZssegError as error:
            raise AssertionError(f"a damaged cache ended the engine: {error}") from error
        if not np.array_equal(labels, expected):
            raise AssertionError("a damaged cache changed labels")

    return attempt


@target("reports", "profiles as `profile show` reads them")
def _reports(folder: Path) -> Attempt:
    from zsseg_rt.common import schema
    from zsseg_rt.profiling.conditions import Conditions, Reading
    from zsseg_rt.profiling.report import Report, Samples, VariantReport, read_report, summarise

    times = summarise([1.0, 2.0, 3.0, 4.0])
    samples = Samples(rounds=(0,), wall_ms=(1.0,))
    variant = VariantReport(
        name="v", bundle="b", size_mb=1.0, settings={}, described={"device": "cpu"}, classes=1,
        frame="1x1", streams=1, wall=times, stages={} if times is None else {"s": times},
        samples=samples,
    )  # fmt: skip
    report = Report(
        version="0", command="x", machine={"cpu": "x"}, source="x", threshold=0.02, rounds=1,
        seconds=1.0, interrupted=False, variants=(variant,), comparisons=(),
        conditions=Conditions(readings=(Reading(name="x", value=1.0),)), notes=("x",),
    )  # fmt: skip
    document, path = schema.encode(report), folder / "profile.json"

    def attempt(draw: random.Random) -> None:
        path.write_bytes(spoil_json(document, draw))
        read_report(path)

    return attempt


@target("checkpoints", ".pth, TorchScript and safetensors files with damaged bytes", group="torch")
def _checkpoints(folder: Path) -> Attempt:
    import torch
    from safetensors.torch import save_file
    from torch import nn

    from zsseg_rt.models import load_checkpoint

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2).half())
    content = {"meta": {"epoch": 3}, "state_dict": model.state_dict()}
    files = {name: folder / name for name in ("zip.pth", "old.pth", "s.pt", "w.safetensors")}
    torch.save(content, files["zip.pth"])
    torch.save(content, files["old.pth"], _use_new_zipfile_serialization=False)
    torch.jit.script(model[:2]).save(str(files["s.pt"]))
    save_file(model.state_dict(), files["w.safetensors"])
    originals = {path: path.read_bytes() for path in files.values()}

    def attempt(draw: random.Random) -> None:
        path = draw.choice(list(originals))
        path.write_bytes(spoil_bytes(originals[path], draw))
        load_checkpoint(path)

    return attempt


@target("settings", "training and comparison settings in TOML, and --set", group="torch")
def _settings(folder: Path) -> Attempt:
    from tools.studies.compare_systems import Comparison
    from zsseg_rt.training.config import TrainConfig, list_recipes

    recipes = [TrainConfig.load(name).to_toml() for name in list_recipes()]
    path = folder / "a.toml"

    def attempt(draw: random.Random) -> None:
        recipe = draw.choice(recipes)
        if draw.random() < 0.4:
            path.write_bytes(spoil_bytes(recipe.encode(), draw))
        else:
            lines = recipe.splitlines()
            place = draw.randrange(len(lines))
            key = lines[place].split("=")[0]
            lines[place] = f"{key} = {draw.choice((odd_text(draw), json.dumps(odd_value(draw))))}"
            path.write_text("\n".join(lines), "utf-8", "surrogatepass")
        changes = [odd_text(draw)] if draw.random() < 0.2 else []
        kind = draw.choice((TrainConfig, TrainConfig, Comparison))
        if kind is Comparison:
            Comparison.load(path)
        else:
            TrainConfig.load(path, changes)

    return attempt


@target("runs", "the folder of a training run: checkpoints, logs", group="torch")
def _runs(folder: Path) -> Attempt:
    from tools.torture.small_run import train_small
    from zsseg_rt.training.trained import find_checkpoint, load_classes, load_trained

    run = train_small(folder / "run")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def attempt(draw: random.Random) -> None:
        path = draw.choice(list(files))
        if path.suffix == ".json" and draw.random() < 0.7:
            path.write_bytes(spoil_json(json.loads(files[path]), draw))
        elif draw.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(spoil_bytes(files[path], draw))
        try:
            checkpoint = find_checkpoint(run)
            load_trained(checkpoint)
            load_classes(checkpoint)
        finally:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])

    return attempt
