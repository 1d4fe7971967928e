"""Stand-ins that tests share: a bundle folder without real graphs, and a way to damage one."""

from __future__ import annotations

import json
from pathlib import Path

from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import FileEntry, GraphEntry, HeadSpec, PreprocessSpec, TextSpec
from zsseg_rt.common import schema
from zsseg_rt.common.arrays import TensorSpec


def write_fake_bundle(root: Path, **changes) -> Path:
    """Write a dense bundle whose graph is a text file; enough for everything that reads bundles."""
    root.mkdir(parents=True)
    graph = root / "image_encoder.float32.onnx"
    graph.write_bytes(b"not a graph")
    described = FileEntry.describe(graph, root)
    fields = {
        "format_version": 1,
        "name": "fake",
        "family": "dense",
        "architecture": "fake",
        "graphs": {
            "image_encoder": {
                "float32": GraphEntry(
                    **vars(described),
                    inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 8, 8)),),
                    outputs=(TensorSpec(name="patch_embeds", dtype="float32", shape=(1, 4, 3)),),
                )
            }
        },
        "preprocess": PreprocessSpec(size_hw=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3),
        "text": TextSpec(embed_dim=3, templates=("a {}",)),
        "head": HeadSpec(logit_scale=1.0, normalize=True, activation="none", grid_hw=(2, 2)),
    }
    bundle = Bundle(path=root, **{**fields, **changes})
    (root / "bundle.json").write_text(json.dumps(bundle.to_manifest()))
    return root


def edit_manifest(root: Path, keys: tuple[str | int, ...], value) -> None:
    """Set one key of ``bundle.json``; the value ``...`` deletes it."""
    path = root / "bundle.json"
    manifest = json.loads(path.read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = schema.encode(value)
    path.write_text(json.dumps(manifest))
