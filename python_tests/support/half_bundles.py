"""Bundles of tiny models whose graphs take and give half precision, beside the same in float32."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support import tiny
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt import Bundle
from zsseg_rt.bundles import specs as bundle_specs
from zsseg_rt.export import bundle_writer
from zsseg_rt.export.bundle_writer import write_manifest, write_model_bundle
from zsseg_rt.export.exporters import EXPORTERS
from zsseg_rt.export.graph_files import save_graphs
from zsseg_rt.export.options import read_options
from zsseg_rt.models import from_official
from zsseg_rt.onnx.reader import map_file, read_network

STORED = Path(__file__).parents[1] / "bundles" / "v1"
NAMES = [f"name {index}" for index in range(7)]


def _dense() -> Any:
    weights = tiny.clip_state_dict(tiny.TinySizes(text_vocab=49408, text_length=77))
    heads = {"num_heads": 4, "text_heads": 4, "head": "maskclip", "activation": "quick_gelu"}
    usual = {"image_size": (64, 96), "logit_scale": 100.0, "position": "size"}  # create_model's
    return from_official("dense_clip", weights, **heads, **usual)


FAMILIES = {
    "dense": _dense, "zegclip": tiny.zegclip_model, "clip_rc": tiny.clip_rc_model,
    "zeroseg": zeroseg_model,
}  # fmt: skip


def half_and_wide(family: str, folder: Path) -> tuple[Path, Path]:
    """A bundle of float16 graphs with inputs and outputs in float16, and one with float32 ones."""
    model = FAMILIES[family]()
    asked: dict[str, Any] = {
        "precisions": ("float16",),
        "templates": ["a {}"],
        "text_encoder": None,
        "text_bank": (NAMES, tiny.text_embeds(7, 32).numpy()),
        "class_names": NAMES,
        "verify": False,  # float16 weights computed in float32 are judged as float32
    }
    exporter = EXPORTERS[model.architecture]
    options = read_options(asked, exporter.reads, model.architecture)
    exported = exporter.export(model.eval(), options)
    half = write_model_bundle(folder / f"{family}-half.zsseg", lambda: exported, options)
    with pytest.MonkeyPatch.context() as patch:
        none = {n: replace(f, half_tensors=()) for n, f in bundle_specs.FAMILIES.items()}
        patch.setattr(bundle_writer, "FAMILIES", none)
        wide = write_model_bundle(folder / f"{family}-wide.zsseg", lambda: exported, options)
    return half, wide


def stored_in_half(name: str, folder: Path) -> Path:
    """A stored bundle whose float32 graphs became float16 graphs with float16 edges."""
    path = Path(shutil.copytree(STORED / f"{name}.zsseg", folder / f"{name}.zsseg"))
    bundle = Bundle.load(path)
    networks = {
        graph: partial(read_network, map_file(path / bundle.graph(graph, "float32").file))
        for graph in set(bundle.graphs) - {"text_encoder"}
    }
    half = bundle_specs.FAMILIES[bundle.family].half_tensors
    graphs = {**bundle.graphs, **save_graphs(networks, path, ("float16",), half)}
    write_manifest(path, replace(bundle, graphs=graphs))
    return path
