"""Where fetched bundles and their checkpoints lie, and how a name becomes a bundle's folder."""

from __future__ import annotations

import os
from pathlib import Path

from zsseg_rt.bundles.pretrained.sets import SETS, find_set
from zsseg_rt.common import schema
from zsseg_rt.common.files import default_cache_dir, is_file, is_folder
from zsseg_rt.demo import DEFAULT, DEMOS, demo_bundle
from zsseg_rt.errors import BundleError

_SUFFIX = ".zsseg"
_MANIFEST = "bundle.json"
_SHIPPED = {"demo": DEFAULT, **{f"demo-{name}": name for name in DEMOS}}


def bundle_place(name: str) -> Path:
    """The folder of the bundle that is fetched under this name."""
    return default_cache_dir() / "bundles" / f"{name}{_SUFFIX}"


def checkpoint_folder(repository: str) -> Path:
    """The folder of the files from one repository, also where to put them by hand."""
    return default_cache_dir() / "checkpoints" / repository.rpartition("://")[2].replace("/", "--")


def find_bundle(given: str | Path) -> Path:
    """The folder that a path or a fetched bundle's name stands for; ``demo``, ``demo-scenes`` ship.

    A bundle at the path wins over the name. Anything else at the path does not: a folder of results
    called ``naclip-b16`` does not hide the bundle of this name. With a folder in front, such as
    ``results/naclip-b16``, it is always a path.

    Returns:
        A folder, which is not read here.
    """
    path = Path(given)
    if not _may_be_name(given) or is_file(path / _MANIFEST):
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


def _may_be_name(given: str | Path) -> bool:
    """Whether it is one plain word, such as names are, without a path's marks."""
    word = os.fspath(given)
    return bool(word) and Path(word).name == word and Path(word).suffix != _SUFFIX
