"""The models that a check measures: exported beforehand, packed, carried over, unpacked.

    python tools/gpu_check/gpu_models.py [FOLDER]        (prepare.sh runs it)

It writes the bundle of ZegCLIP ViT-B/16 at 512x512 in float32 and float16, and one packed file of
26 MB to carry to the GPU. Weights are random; of matrices only their signs, which pack well.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "zegclip.zsseg"
PACKED = "models.tar.xz"
STORED = ROOT / "python_tests" / "bundles" / "v1" / "descriptor.zsseg"
# Both precisions hold the same signs: the dictionary spans the one to the other.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 1 << 28}]


def main(arguments: list[str] | None = None) -> int:
    """Export and pack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER",
                        default=ROOT / "build" / "gpu_check" / "models")  # fmt: skip
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import engine_model

    bundle = args.folder / MODEL
    shutil.rmtree(bundle, ignore_errors=True)
    engine_model.export(engine_model.build_model(args.size), bundle, ("float32", "float16"))
    packed = pack(bundle, args.folder / PACKED)
    print(f"wrote {bundle} and {packed}, {packed.stat().st_size / 1e6:.0f} MB: carry the latter")
    return 0


def pack(bundle: Path, target: Path) -> Path:
    """Pack a bundle into one file, whole or not at all."""
    partial = target.with_suffix(".part")
    with (
        lzma.open(partial, "wb", filters=FILTERS) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        archive.add(bundle, arcname=MODEL)
    partial.replace(target)
    return target


def find_model(folder: Path, work: Path, *, quick: bool) -> Path | None:
    """The bundle to measure: a folder's own, or unpacked into the working folder; None without."""
    if quick:
        return STORED
    for place in (folder if folder.suffix == ".zsseg" else folder / MODEL, work / MODEL):
        if (place / "bundle.json").is_file():
            return place
    packed = folder / PACKED
    if not packed.is_file():
        return None
    with tempfile.TemporaryDirectory(dir=work) as scratch, tarfile.open(packed) as archive:
        # Older Pythons know no filter; the file is one of ours.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(scratch, **safe)
        (Path(scratch) / MODEL).rename(work / MODEL)
    return work / MODEL


if __name__ == "__main__":
    sys.exit(main())
