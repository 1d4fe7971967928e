"""Write a torch model's bundle: what is the same for the models of every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from zsseg_rt.bundle import FileEntry
from zsseg_rt.export.bundle_writer import (
    TextBank,
    bundle_name,
    new_bundle_folder,
    write_arrays,
    write_golden,
    write_manifest,
    write_text_bank,
)
from zsseg_rt.export.onnx import GraphExport, provenance, save_graphs
from zsseg_rt.export.text_side import TextSide

__all__ = ["write_model_bundle"]


def write_model_bundle(
    path: Path,
    graphs: Mapping[str, GraphExport],
    text: TextSide,
    golden: Callable[[], Mapping[str, npt.NDArray[Any]]],
    *,
    precisions: Sequence[str],
    embed_dim: int,
    text_bank: TextBank | None,
    name: str | None,
    template_set: str,
    space: str,
    source: str,
    overwrite: bool,
    verify: bool,
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
    **fields: Any,
) -> Path:
    """Write graphs, text side, golden sample and manifest; check the bundle, then name it.

    Args:
        path: Folder to write, ``NAME.zsseg``.
        graphs: What to export, by the graphs' names; the text tower is added.
        text: The text side.
        golden: Makes the golden sample; called when the tokenizer is there.
        precisions: Graph variants, of ``"float32"`` and ``"float16"``.
        embed_dim: Width D of the joint space.
        text_bank: Names with embeddings float [C, D] that ``set_classes`` uses for these names.
        name: Name in the manifest; None takes the folder's.
        template_set: A short name of the templates.
        space: Which joint space the embeddings live in, for people.
        source: Where the weights come from, for people.
        overwrite: Whether to replace an existing bundle.
        verify: Whether to compare with the golden sample.
        weights: Arrays that the engine needs beside the graphs.
        **fields: The manifest's fields that depend on the family.

    Returns:
        The bundle folder.

    Raises:
        BackendError: The exporter failed, or emitted control flow.
        BundleError: The folder exists, cannot be written, or the bundle disagrees with torch.
        CheckpointError: A weight does not fit into float16.
        VocabularyError: The text bank is unusable.
    """
    with new_bundle_folder(path, overwrite=overwrite, verify=verify) as folder:
        entries = save_graphs(graphs, folder, precisions, text_encoder=text.encoder)
        tokenizer = text.write_tokenizer(folder)
        write_manifest(
            folder,
            name=name or bundle_name(path),
            graphs=entries,
            weights=_write_weights(folder, weights),
            text=text.spec(
                entries, tokenizer, embed_dim=embed_dim, template_set=template_set, space=space
            ),
            text_bank=write_text_bank(folder, text_bank, embed_dim),
            golden=write_golden(folder, golden()),
            provenance=provenance(source),
            **fields,
        )
    return path


def _write_weights(folder: Path, arrays: Mapping[str, npt.NDArray[Any]] | None) -> FileEntry | None:
    return None if arrays is None else write_arrays(folder, "weights.safetensors", arrays)
