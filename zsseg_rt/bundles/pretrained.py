"""The published weights that can be fetched by name, and what is made from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from zsseg_rt.common import schema
from zsseg_rt.common.files import default_cache_dir, is_file, is_folder
from zsseg_rt.demo import DEFAULT, DEMOS, demo_bundle
from zsseg_rt.errors import ArgumentError, BundleError


@dataclass(frozen=True, kw_only=True)
class PretrainedSet:
    """Published weights, and what makes a bundle of them."""

    name: str  # What users type
    # Repository on the Hugging Face Hub, owner/name, or spaces/owner/name; or the address of a
    # folder on another server
    repository: str
    clip: str  # open_clip's name of the architecture
    tag: str  # open_clip's name of the weights; what others' are called here
    head: str  # Dense head, see zsseg_rt.export.clip_file.DenseHead; empty for other systems
    activation: str  # The MLPs', which the file does not say
    num_parameters: int  # Numbers in the model
    licence: str  # Of the weights, as their repository states it
    good_for: str  # One line for those who choose
    published: str = ""  # Accuracy that its authors, or who is named, report; empty: none was read
    cost: str = ""  # What a frame costs at size, and where times were measured; empty: not counted
    size: int = 448  # Side of the bundle's input in pixels
    files: tuple[str, ...] = ("open_clip_model.safetensors",)
    revision: str = "main"  # Commit of the repository; its files never change
    # Of files whose SHA-256 is known beside what the hub says, in hex by name
    sha256: Mapping[str, str] = field(default_factory=dict)
    architecture: str = "dense_clip"  # The torch model that the file is read into
    number_bytes: int = 4  # Of each number in the file: float32, or float16

    @property
    def page(self) -> str:
        """Where the files are, for people."""
        return self.repository if "://" in self.repository else f"huggingface.co/{self.repository}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights; the file has some tens of kB more."""
        return self.number_bytes * self.num_parameters


def _read_table() -> dict[str, PretrainedSet]:
    """The rows of ``pretrained.json``; those of the same weights share what is said of these."""
    table = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    rows = {
        name: table["weights"].get(row.pop("weights", ""), {}) | row
        for name, row in table["sets"].items()
    }
    return {
        name: schema.decode(PretrainedSet, {"name": name, **row}, name)
        for name, row in rows.items()
    }


RECOMMENDED = "sfp-b16"
"""The best labels of any names without training on masks, by published figures alone."""

SIDES = ("224", "336", "448")
"""Inputs that can be asked for: whole patches of 14 and of 16 pixels."""

SETS = _read_table()
"""All sets by name, in the order in which they are listed."""


def find_set(name: str) -> PretrainedSet | None:
    """The set of this name, or None; ``NAME-336`` is ``NAME`` with an input of 336x336 pixels."""
    base, _, side = name.rpartition("-")
    one = SETS.get(base)
    if one is None or side not in SIDES or one.architecture == "cat_seg":
        return SETS.get(name)
    return replace(one, name=name, size=int(side))


def known_set(name: str) -> PretrainedSet:
    """The set of this name; :func:`find_set`, but a wrong name is an error."""
    if (one := find_set(name)) is None:
        hint = schema.nearest(name, list(SETS)).replace("Known keys", "Known names")
        raise ArgumentError(
            f"name: expected a set that can be fetched, got {name!r}. {hint}"
            f" Inputs: --size {', '.join(SIDES)}; CAT-Seg has one."
        )
    return one


_SUFFIX = ".zsseg"
_MANIFEST = "bundle.json"
_SHIPPED = {"demo": DEFAULT, **{f"demo-{name}": name for name in DEMOS}}


def bundle_place(name: str) -> Path:
    """The folder of the bundle that is fetched under this name."""
    return default_cache_dir() / "bundles" / f"{name}{_SUFFIX}"


def checkpoint_folder(repository: str) -> Path:
    """The folder of the files from one repository, also where to put them by hand."""
    return default_cache_dir() / "checkpoints" / repository.rpartition("://")[2].replace("/", "--")


def find_bundle(name_or_path: str | Path) -> Path:
    """The folder that a path or a fetched bundle's name stands for; ``demo``, ``demo-scenes`` ship.

    A bundle at the path wins over the name; anything else there does not, as a folder of results
    called ``naclip-b16``. With a folder in front, such as ``results/naclip-b16``, it is always a
    path.
    """
    path = Path(name_or_path)
    if not _may_be_name(name_or_path) or is_file(path / _MANIFEST):
        return path
    fetched = bundle_place(path.name)
    if is_folder(fetched):
        return fetched
    if path.name in _SHIPPED:
        return demo_bundle(_SHIPPED[path.name])
    if (one := find_set(path.name)) is not None:
        size = round(one.weight_bytes / 1e6)
        raise BundleError(
            f"{path}: expected a bundle that was fetched, found none in {fetched.parent}. Run: "
            f"zsseg-rt fetch {path} (downloads about {size} MB)"
        )
    if not os.path.lexists(path):
        hint = schema.nearest(path.name, list(SETS)).replace("Known keys", "Names to fetch")
        raise BundleError(
            f"{path}: expected a bundle folder or the name of a fetched bundle, found nothing. "
            f"Check the path. {hint}"
        )
    return path


def _may_be_name(name_or_path: str | Path) -> bool:
    """Whether it is one plain word, such as names are, without a path's marks."""
    word = os.fspath(name_or_path)
    return bool(word) and Path(word).name == word and Path(word).suffix != _SUFFIX
