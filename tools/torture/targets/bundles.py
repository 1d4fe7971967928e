"""Bundles: their manifest, graphs, tokenizer and what is exported into them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tools.torture.damage import odd_text, odd_value, spoil_bytes, spoil_json
from tools.torture.target import BUNDLES, Attempt, target
from tools.torture.targets.operators import run_graph
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.onnx.check import check_graph
from zsseg_rt.text.tokenizer import Tokenizer

CONFIG = EngineConfig(device="cpu", precision="float32", num_threads=1, use_cache=False)
_MANIFEST = "bundle.json"


def use_bundle(path: Path) -> None:
    """Everything that a program does with a bundle."""
    bundle = Bundle.load(path)
    bundle.verify()
    with Engine(bundle, CONFIG) as engine:
        width = engine.bundle.text.embed_dim
        rows = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        engine.set_classes(["a", "b"], embeddings=rows)
        engine.segment(np.zeros((24, 32, 3), np.uint8))


@target("manifest", "bundle.json: odd values, missing and unknown keys, damaged bytes", weight=2)
def _manifest(folder: Path) -> Attempt:
    originals = _copies(folder)

    def attempt(draw: random.Random) -> None:
        path = draw.choice(list(originals))
        (path / _MANIFEST).write_bytes(spoil_json(json.loads(originals[path]), draw))
        try:
            use_bundle(path)
        finally:
            (path / _MANIFEST).write_bytes(originals[path])

    return attempt


@target("bundle-files", "graphs, weights, samples and text rows of a bundle: damaged bytes")
def _bundle_files(folder: Path) -> Attempt:
    paths = list(_copies(folder))

    def attempt(draw: random.Random) -> None:
        path = draw.choice(paths)
        file = draw.choice([file for file in path.iterdir() if file.name != _MANIFEST])
        content = file.read_bytes()
        file.write_bytes(spoil_bytes(content, draw))
        try:
            use_bundle(path)
        finally:
            file.write_bytes(content)

    return attempt


@target("rehashed", "the same with right checksums, as somebody hostile would write them")
def _rehashed(folder: Path) -> Attempt:
    originals = _copies(folder)

    def attempt(draw: random.Random) -> None:
        path = draw.choice(list(originals))
        names = [f.name for f in path.iterdir() if f.suffix in (".npz", ".safetensors")]
        file = path / draw.choice(names)
        content = file.read_bytes()
        file.write_bytes(spoil_bytes(content, draw))
        document = json.loads(originals[path])
        _rehash(document, file)
        (path / _MANIFEST).write_text(json.dumps(document))
        try:
            use_bundle(path)
        finally:
            file.write_bytes(content)
            (path / _MANIFEST).write_bytes(originals[path])

    return attempt


def _copies(folder: Path) -> dict[Path, bytes]:
    """Copies of the stored bundles, with what their manifests hold."""
    found = {}
    for family in sorted(FAMILIES):
        copy = folder / f"{family}.zsseg"
        if not copy.exists():
            shutil.copytree(BUNDLES / copy.name, copy)
        shutil.copy(BUNDLES / copy.name / _MANIFEST, copy / _MANIFEST)
        found[copy] = (copy / _MANIFEST).read_bytes()
    return found


def _rehash(tree: Any, file: Path) -> None:
    if isinstance(tree, dict):
        if tree.get("file") == file.name:
            content = file.read_bytes()
            tree["sha256"] = hashlib.sha256(content).hexdigest()
            for key in ("bytes", "size"):
                if key in tree:
                    tree[key] = len(content)
        for value in tree.values():
            _rehash(value, file)
    elif isinstance(tree, list):
        for value in tree:
            _rehash(value, file)


def _spoilt_graph(draw: random.Random) -> bytes:
    content = draw.choice(_GRAPHS)
    if draw.random() < 0.5:
        return spoil_bytes(content, draw)
    model = onnx.load_from_string(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        _alter(model, draw)
    return bytes(model.SerializeToString())


_GRAPHS = [path.read_bytes() for path in sorted(BUNDLES.glob("*/*.onnx"))]


@target("graphs", "ONNX files: damaged bytes; altered nodes, sizes, types and weights", weight=2)
def _graphs(folder: Path) -> Attempt:
    def attempt(draw: random.Random) -> None:
        path = folder / "graph.onnx"
        path.write_bytes(_spoilt_graph(draw))
        check_graph(path)

    return attempt


@target("graph-runs", "the same, run by OpenVINO if they pass the check", group="operators")
def _graph_runs(folder: Path) -> Attempt:
    def attempt(draw: random.Random) -> None:
        path = folder / "graph.onnx"
        path.unlink(missing_ok=True)  # it may still be mapped
        path.write_bytes(_spoilt_graph(draw))
        run_graph(path, draw)

    return attempt


_NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 7, 64, 65536, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
_FLOATS = (float("nan"), float("inf"), -1e38, 0.0)
_TEXTS = ("", "gone", "graph.onnx", "/etc/passwd", "../x", "location")
_OPERATORS = ("Loop", "If", "Scan", "Reshape", "Gather", "Tile", "Expand", "Pad", "Resize")


def _alter(model: onnx.ModelProto, draw: random.Random) -> None:
    """Give a field of a graph an odd value, or that of another; drop, repeat or shuffle entries."""
    graph = model.graph
    texts = [*_TEXTS, *_OPERATORS, odd_text(draw).encode("utf-8", "replace").decode()[:100]]
    for node in graph.node:
        texts += [*node.input, *node.output, node.op_type]
    values = [*graph.input, *graph.output]
    parts = [list(part) for part in (graph.node, graph.node, graph.initializer, values) if part]
    damaged = draw.choice([*map(draw.choice, parts), graph])
    message = draw.choice([damaged] if damaged is graph else list(_messages(damaged)))
    fields = [field for field, _ in message.ListFields()]
    field = draw.choice(message.DESCRIPTOR.fields if draw.random() < 0.1 or not fields else fields)
    old = getattr(message, field.name)
    with contextlib.suppress(ValueError):  # not every kind of number fits
        if isinstance(old, (str, bytes, int, float)):
            setattr(message, field.name, _odd_field(old, texts, draw))
        elif not hasattr(old, "extend"):
            message.ClearField(field.name)
        elif old:
            entries, place = list(old), draw.randrange(len(old))
            kind = draw.randrange(4)
            if kind == 0:
                draw.shuffle(entries)
            elif kind == 1:
                del entries[place]
            elif kind == 2 or field.message_type is not None:
                entries.insert(place, draw.choice(entries))
            else:
                entries[place] = _odd_field(entries[place], texts, draw)
            del old[:]
            old.extend(entries)


def _messages(message: Any) -> Iterator[Any]:
    """A message and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if hasattr(value, "extend") else [value]:
                yield from _messages(inner)


def _odd_field(old: Any, texts: list[str], draw: random.Random) -> Any:
    if isinstance(old, str):
        return draw.choice(texts)
    if isinstance(old, float):
        return draw.choice(_FLOATS)
    if isinstance(old, int):
        return draw.choice((*_NUMBERS, *range(24)))
    if len(old) % 8 or not old or draw.random() < 0.5:
        return spoil_bytes(old, draw)
    numbers = np.frombuffer(old, np.int64).copy()  # shapes and indices that the graph computes with
    numbers[draw.randrange(numbers.size)] = draw.choice(_NUMBERS)
    return numbers.tobytes()


@target("tokenizer", "tokenizer.json with odd content, and odd texts")
def _tokenizer(folder: Path) -> Attempt:
    original = (Bundle.demo("scenes").path / "tokenizer.json").read_bytes()
    document, sound, path = json.loads(original), Tokenizer(original), folder / "t.json"

    def attempt(draw: random.Random) -> None:
        if draw.random() < 0.5:
            text = odd_text(draw)
            sound.encode([text, text[::-1]])
            sound.unknown_words(text)
            return
        path.write_bytes(spoil_json(document, draw))
        Tokenizer(path).encode(["a red ball", odd_text(draw)])

    return attempt


_EXPORT_OPTIONS = ("logit_scale", "normalize", "activation", "unknown_below", "name",
                   "precisions", "architecture", "templates", "space", "licence")  # fmt: skip


@target(
    "export-dense", "an encoder's graph, settings and text rows for `export dense`", group="torch"
)
def _export_dense(folder: Path) -> Attempt:
    from zsseg_rt.export import export_dense_bundle

    graph = BUNDLES / "dense.zsseg/image_encoder.float32.onnx"
    sound: dict[str, Any] = {"image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    sound["grid_hw"] = (8, 8)

    def attempt(draw: random.Random) -> None:
        path, settings = folder / "e.onnx", {**sound}
        path.write_bytes(graph.read_bytes())
        if draw.random() < 0.5:
            model = onnx.load(path)
            _alter(model, draw)
            path.write_bytes(model.SerializeToString())
        else:
            settings[draw.choice((*sound, *_EXPORT_OPTIONS))] = odd_value(draw)
        export_dense_bundle(path, folder / "out.zsseg", overwrite=True, **settings)

    return attempt
