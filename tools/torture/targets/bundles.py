"""Bundles: their manifest, graphs, tokenizer and what is exported into them."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

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


def _graphs() -> list[Path]:
    return sorted(BUNDLES.glob("*/*.onnx"))


def _spoilt_graph(draw: random.Random) -> bytes:
    content = draw.choice(_GRAPHS)
    if draw.random() < 0.5:
        return spoil_bytes(content, draw)
    model = onnx.load_from_string(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        draw.choice(_FIELDS)(model, draw)
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


def _number(draw: random.Random) -> int:
    return draw.choice((-(2**63), -1, 0, 1, 2, 3, 7, 64, 65536, 2**31 - 1, 2**31, 2**40, 2**63 - 1))


def _alter_attribute(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    attribute = draw.choice(draw.choice(nodes).attribute)
    kind = draw.randrange(4)
    if kind == 0:
        attribute.i = _number(draw)
    elif kind == 1:
        attribute.ints[:] = [_number(draw) for _ in range(draw.randrange(6))]
    elif kind == 2:
        attribute.f = draw.choice((float("nan"), float("inf"), -1e38, 0.0))
    else:
        attribute.type = draw.randrange(15)


def _alter_inputs(model: onnx.ModelProto, draw: random.Random) -> None:
    node, other = draw.choice(model.graph.node), draw.choice(model.graph.node)
    names = [*other.input, *other.output, *(w.name for w in model.graph.initializer), "", "gone"]
    places = draw.choice((node.input, node.input, node.output))
    if draw.random() < 0.2:
        places.append(draw.choice(names))
    elif places:
        places[draw.randrange(len(places))] = draw.choice(names)


def _alter_operator(model: onnx.ModelProto, draw: random.Random) -> None:
    others = [node.op_type for node in model.graph.node]
    names = [*others, "Loop", "If", "Scan", "Reshape", "Gather", "Tile", "Expand", "Pad", "Resize"]
    draw.choice(model.graph.node).op_type = draw.choice(names)


def _alter_weight(model: onnx.ModelProto, draw: random.Random) -> None:
    if not model.graph.initializer:
        return
    weight = draw.choice(model.graph.initializer)
    kind = draw.randrange(5)
    if kind == 0 and weight.dims:
        weight.dims[draw.randrange(len(weight.dims))] = _number(draw)
    elif kind == 1:
        weight.data_type = draw.randrange(24)
    elif kind == 2:
        weight.raw_data = spoil_bytes(weight.raw_data, draw)
    elif kind == 3:
        weight.dims[:] = [_number(draw) for _ in range(draw.randrange(6))]
    else:
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", draw.choice(("/etc/passwd", "../x", "graph.onnx"))


def _alter_integers(model: onnx.ModelProto, draw: random.Random) -> None:
    """Shapes and indices that the graph computes with."""
    found = [
        w
        for w in model.graph.initializer
        if w.data_type == TensorProto.INT64 and len(w.raw_data) % 8 == 0
    ]
    if found:
        weight = draw.choice(found)
        values = np.frombuffer(weight.raw_data, np.int64).copy()
        if values.size:
            values[draw.randrange(values.size)] = _number(draw)
            weight.raw_data = values.tobytes()


def _alter_interface(model: onnx.ModelProto, draw: random.Random) -> None:
    value = draw.choice([*model.graph.input, *model.graph.output])
    kind, dims = draw.randrange(4), value.type.tensor_type.shape.dim
    if kind == 0 and dims:
        draw.choice(dims).dim_value = _number(draw)
    elif kind == 1:
        value.type.tensor_type.elem_type = draw.randrange(24)
    elif kind == 2:
        value.name = odd_text(draw).encode("utf-8", "replace").decode()[:100]
    else:
        dims.add().dim_value = _number(draw)


def _alter_order(model: onnx.ModelProto, draw: random.Random) -> None:
    nodes = list(model.graph.node)
    if draw.random() < 0.5:
        draw.shuffle(nodes)
    else:
        nodes.insert(draw.randrange(len(nodes)), draw.choice(nodes))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


_FIELDS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    _alter_attribute,
    _alter_inputs,
    _alter_operator,
    _alter_weight,
    _alter_integers,
    _alter_interface,
    _alter_order,
)


@target("tokenizer", "tokenizer.json with odd content, and odd texts")
def _tokenizer(folder: Path) -> Attempt:
    original = (Bundle.demo("scenes").path / "tokenizer.json").read_bytes()
    document, sound, path = json.loads(original), Tokenizer(original.decode()), folder / "t.json"

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
            draw.choice(_FIELDS)(model, draw)
            path.write_bytes(model.SerializeToString())
        else:
            settings[draw.choice((*sound, *_EXPORT_OPTIONS))] = odd_value(draw)
        export_dense_bundle(path, folder / "out.zsseg", overwrite=True, **settings)

    return attempt
