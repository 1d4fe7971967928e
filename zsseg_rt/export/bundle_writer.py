"""Write bundles whole or not at all: into a hidden folder, checked, then moved to their place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.bundle import FORMAT_VERSION, MANIFEST, Bundle
from zsseg_rt.bundles.specs import (
    FAMILIES,
    FileEntry,
    HeadSpec,
    PreprocessSpec,
    TextBankEntry,
)
from zsseg_rt.common.files import remove_leftovers, whole_folder, why_unwritable
from zsseg_rt.common.process import free_memory
from zsseg_rt.errors import BundleError, VocabularyError
from zsseg_rt.export.golden import golden_names, require_passed, verify_bundle
from zsseg_rt.export.graph_files import WrittenGraph, provenance, save_graphs
from zsseg_rt.export.options import ExportOptions, TextBank
from zsseg_rt.export.text_side import TextSide

Arrays = Mapping[str, npt.NDArray[Any]]
SUFFIX = ".zsseg"


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """All that an exporter makes from a model; its bundle is written from this and the options."""

    family: str  # The family that runs it
    architecture: str  # Human-readable name of what it is
    # What its graphs are made from, by graph name; the text side adds the text tower
    graphs: Mapping[str, WrittenGraph]
    preprocess: PreprocessSpec  # How a frame becomes the image encoder's input
    head: HeadSpec  # How features become labels
    text: TextSide  # Text tower, tokenizer and prompts
    # Makes the golden sample of this model for a few names
    golden: Callable[[ExportedModel, list[str]], Arrays]
    # How the graphs were made
    provenance: Mapping[str, Any] = field(default_factory=provenance)
    # What only this family has in bundle.json, by key
    sections: Mapping[str, Any] = field(default_factory=dict)
    weights: Arrays | None = None  # Arrays that the engine needs beside the graphs


def write_model_bundle(
    path: Path, make: Callable[[], ExportedModel], options: ExportOptions
) -> Path:
    """Write graphs, text side, golden sample, manifest; check the bundle, then move it into place.

    ``make`` reads the weights, which are let go before the bundle is checked.
    """
    with new_bundle_folder(path, overwrite=options.overwrite, verify=options.verify) as folder:
        exported = make()
        text_graphs, text = exported.text.write(folder)
        text_bank = _write_text_bank(folder, options.text_bank, text.embed_dim)
        golden = write_golden(folder, exported.golden(exported, golden_names(options.class_names)))
        half = FAMILIES[exported.family].half_tensors
        graphs = save_graphs(exported.graphs, folder, options.precisions, half)
        graphs |= text_graphs
        weights = None
        if exported.weights is not None:
            weights = _write_arrays(folder, "weights.safetensors", exported.weights)
        bundle = Bundle(
            path=folder,
            format_version=FORMAT_VERSION,
            name=path.stem,
            family=exported.family,
            architecture=exported.architecture,
            graphs=graphs,
            weights=weights,
            preprocess=exported.preprocess,
            text=text,
            text_bank=text_bank,
            head=exported.head,
            **exported.sections,
            golden=golden,
            provenance={**exported.provenance, "source": options.source},
            licence=options.licence,
        )
        write_manifest(folder, bundle)
        del exported
        free_memory()
    return path


@contextmanager
def new_bundle_folder(path: Path, *, overwrite: bool, verify: bool) -> Iterator[Path]:
    """Yield a folder to fill that becomes ``path`` if nothing fails.

    An old bundle stays in place until the new one replaces it in one step. What killed
    processes left behind while writing this bundle is removed.
    """
    try:
        remove_leftovers(path)
        check_bundle_place(path, overwrite=overwrite)
        with whole_folder(path, overwrite=overwrite) as folder:
            yield folder
            if verify:
                require_passed(verify_bundle(folder), path.name)
    except OSError as exc:
        raise BundleError(f"{path}: cannot be written: {exc}. Free space or permissions?") from exc


def write_manifest(folder: Path, bundle: Bundle) -> None:
    """Write ``bundle.json``."""
    content = json.dumps(bundle.to_manifest(), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(content + "\n", encoding="utf-8")


def write_golden(folder: Path, arrays: Arrays) -> FileEntry:
    """Write ``golden.npz``."""
    path = folder / "golden.npz"
    np.savez_compressed(path, **dict(arrays))  # type: ignore[arg-type]
    return FileEntry.describe(path, folder)


def _write_arrays(folder: Path, file: str, arrays: Arrays) -> FileEntry:
    from safetensors.numpy import save  # its save_file hides an OSError

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    (folder / file).write_bytes(save(whole))
    return FileEntry.describe(folder / file, folder)


def _write_text_bank(folder: Path, bank: TextBank | None, embed_dim: int) -> TextBankEntry | None:
    if bank is None:
        return None
    names, embeds = tuple(bank[0]), np.asarray(bank[1], np.float32)
    rows = embeds[0] if embeds.ndim == 3 and len(embeds) == 2 else embeds
    if rows.shape != (len(names), embed_dim) or not names:
        raise VocabularyError(
            f"text_bank: expected one row of {embed_dim} values for each of {len(names)} names, "
            f"got shape {embeds.shape}. Give (names, float [C, {embed_dim}]), or [2, C, "
            f"{embed_dim}] for segments and regions."
        )
    repeated = {name for name in names if names.count(name) > 1}
    if repeated or not all(name.strip() for name in names):
        raise VocabularyError(
            f"text_bank: expected distinct names, got {sorted(repeated) or 'an empty one'}. "
            "Give each row its own name."
        )
    if not np.isfinite(embeds).all():
        raise VocabularyError("text_bank: expected finite embeddings, got NaN or infinity")
    if np.array_equal(embeds.astype(np.float16).astype(np.float32), embeds):
        embeds = embeds.astype(np.float16)  # half the bytes, the same values
    rows = embeds[0] if embeds.ndim == 3 else embeds
    tensors = {"embeds": rows} if rows is embeds else {"embeds": rows, "region_embeds": embeds[1]}
    entry = _write_arrays(folder, "text_bank.safetensors", tensors)
    return TextBankEntry(**vars(entry), names=names)


def check_bundle_place(path: Path, *, overwrite: bool) -> None:
    """Refuse a name that is no bundle's, and a place that is taken or cannot be written to."""
    if path.suffix != SUFFIX:
        raise BundleError(f"path: expected NAME{SUFFIX}, got {path.name!r}. Add the ending.")
    if problem := why_unwritable(path.parent):
        raise BundleError(f"{path}: cannot be written: {problem}. Free space or permissions?")
    if path.exists() and not overwrite:
        raise BundleError(
            f"{path}: expected a new folder, found an existing one. Name another, or replace it "
            "(overwrite=True, or --overwrite on the command line)."
        )
    if path.exists() and not (path / MANIFEST).is_file():
        raise BundleError(
            f"{path}: expected a bundle to replace, found something else. Remove it by hand."
        )
