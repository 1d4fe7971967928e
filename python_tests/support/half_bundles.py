"""Bundles of tiny models whose graphs take and give half precision, beside the same in float32."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support import tiny
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt import Bundle
from zsseg_rt.bundles import specs as bundle_specs
from zsseg_rt.export import bundle_writer
from zsseg_rt.export.bundle_writer import write_manifest, write_model_bundle
from zsseg_rt.export.exporters import EXPORTERS
from zsseg_rt.export.graph_files import save_graphs
from zsseg_rt.export.options import read_options
from zsseg_rt.models import create_model
from zsseg_rt.onnx.reader import map_file, read_network

STORED = Path(__file__).parents[1] / "bundles" / "v1"
NAMES = [f"name {index}" for index in range(7)]
FAMILIES = ("dense", "zegclip", "clip_rc", "zeroseg")


def make_model(family: str, folder: Path) -> Any:
    """A tiny model of the architecture."""
    if family == "zegclip":
        return tiny.zegclip_model()
    if family == "clip_rc":
        return tiny.clip_rc_model()
    if family == "zeroseg":
        return zeroseg_model()
    sizes = tiny.TinySizes(text_vocab=49408, text_length=77)
    path = folder / "clip.pt"
    torch.save(tiny.clip_state_dict(sizes), path)
    heads = {"num_heads": sizes.num_heads, "text_heads": sizes.text_heads}
    return create_model("dense_clip", pretrained=path, activation="quick_gelu", **heads,
                        image_size=(64, 96), head="maskclip")  # fmt: skip


def half_and_wide(family: str, folder: Path, **settings: Any) -> tuple[Path, Path]:
    """A bundle of float16 graphs with inputs and outputs in float16, and one with float32 ones."""
    options: dict[str, Any] = {
        "precisions": ("float16",),
        "templates": ["a {}"],
        "text_encoder": None,
        "text_bank": (NAMES, tiny.text_embeds(7, 32).numpy()),
        "class_names": NAMES,
        "verify": False,  # float16 weights computed in float32 are judged as float32
    }
    model = make_model(family, folder)
    exporter = EXPORTERS[model.architecture]
    export_options = read_options(options | settings, exporter.reads, model.architecture)
    exported = exporter.export(model.eval(), export_options)
    half = write_model_bundle(folder / f"{family}-half.zsseg", lambda: exported, export_options)
    with pytest.MonkeyPatch.context() as patch:
        none = {n: replace(f, half_tensors=()) for n, f in bundle_specs.FAMILIES.items()}
        patch.setattr(bundle_writer, "FAMILIES", none)
        wide = write_model_bundle(folder / f"{family}-wide.zsseg", lambda: exported, export_options)
    return half, wide


def stored_in_half(name: str, folder: Path) -> Path:
    """A stored bundle whose float32 graphs became float16 graphs with float16 edges."""
    path = Path(shutil.copytree(STORED / f"{name}.zsseg", folder / f"{name}.zsseg"))
    bundle = Bundle.load(path)
    graphs = dict(bundle.graphs)
    for graph in set(graphs) - {"text_encoder"}:
        wide = read_network(map_file(path / bundle.graph(graph, "float32").file))
        half = bundle_specs.FAMILIES[bundle.family].half_tensors
        graphs[graph] = save_graphs({graph: lambda wide=wide: wide}, path, ("float16",), half)[
            graph
        ]
    write_manifest(path, replace(bundle, graphs=graphs))
    return path
