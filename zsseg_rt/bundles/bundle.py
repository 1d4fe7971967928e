"""A bundle: a folder ``NAME.zsseg`` with graphs, text side, settings and a golden sample.

``bundle.json`` describes every other file with its size and SHA-256. A reader accepts every older
``format_version`` and refuses a newer one. There are no pickles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from zsseg_rt.bundles.pretrained import find_bundle
from zsseg_rt.bundles.specs import (
    FAMILIES,
    NARROW,
    AggregationSpec,
    ConceptSpec,
    FileEntry,
    GraphEntry,
    HeadSpec,
    PreprocessSpec,
    QuantizationSpec,
    RegionSpec,
    SegmentSpec,
    TextBankEntry,
    TextSpec,
)
from zsseg_rt.common import schema
from zsseg_rt.common.arrays import HALF_PRECISIONS, TensorSpec
from zsseg_rt.common.files import read_limited, sha256_of
from zsseg_rt.demo import DEFAULT, demo_bundle
from zsseg_rt.errors import BundleError, BundleVersionError, PrecisionNotApplied

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
MAX_MANIFEST_BYTES = 16 << 20
_WRITTEN = ("weights", "text_bank", "golden")  # though null; readers may not know other keys
_LEFT_OUT = {"independent_queries": None, "align": "half_pixel"}  # of the head
_DTYPES = ("float32", "int64")  # of graphs' inputs and outputs, beside half precision


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk, read and checked; files are hashed when they are opened.

    Example:
        >>> bundle = Bundle.demo("scenes")
        >>> bundle.name, bundle.family
        ('scenes', 'descriptor')
    """

    path: Path
    format_version: int
    name: str
    family: str
    architecture: str
    graphs: dict[str, dict[str, GraphEntry]]
    preprocess: PreprocessSpec
    text: TextSpec
    head: HeadSpec
    segments: SegmentSpec | None = None
    regions: RegionSpec | None = None
    aggregation: AggregationSpec | None = None
    concepts: ConceptSpec | None = None
    weights: FileEntry | None = None
    text_bank: TextBankEntry | None = None
    golden: FileEntry | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    quantization: dict[str, QuantizationSpec] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read ``bundle.json`` and check that every file is there with the right size.

        Args:
            path: The bundle's folder, or the name of a bundle that was fetched, ``"naclip-b16"``.

        Raises:
            BundleVersionError: The format is newer than this package reads.
            BundleError: Not a bundle, or incomplete, altered, or with a path that leads out of it;
                or the name of one that was not fetched.
        """
        root = find_bundle(path)
        manifest = _read_manifest(root) | {"path": str(root)}
        bundle: Bundle = schema.decode(cls, manifest, str(root / MANIFEST), BundleError)
        bundle._check_family()
        bundle._check_tensors()
        for entry in bundle.files():
            bundle._locate(entry)
        return bundle

    @classmethod
    def demo(cls, name: str = DEFAULT) -> Bundle:
        """A small bundle that ships with the package.

        Args:
            name: ``"photos"`` sees 20 things in photographs; ``"scenes"`` knows a synthetic
                world's words.

        Raises:
            ArgumentError: No bundle of that name ships.
            BundleError: This installation lacks it, or it was altered.
        """
        return cls.load(demo_bundle(name))

    def __repr__(self) -> str:
        graphs = ", ".join(f"{name} ({', '.join(kinds)})" for name, kinds in self.graphs.items())
        height, width = self.preprocess.size_hw
        names = () if self.text_bank is None else self.text_bank.names
        words = f"{len(names)} names" if "text_encoder" not in self.graphs else "any words"
        if self.text.words:
            words = f"phrases of {len(self.text.words)} words"
        return (
            f"Bundle({self.name!r}, family={self.family!r}, path={str(self.path)!r}\n"
            f"  graphs: {graphs}; input {height}x{width}\n"
            f"  takes {words}; licence: {self.licence or 'not stated'})"
        )

    def files(self) -> Iterator[FileEntry]:
        """Every file that ``bundle.json`` names."""
        for variants in self.graphs.values():
            yield from variants.values()
        text = self.text
        for entry in (self.weights, text.tokenizer, text.token_rows, self.text_bank, self.golden):
            if entry is not None:
                yield entry

    def verify(self) -> None:
        """Hash every file; a BundleError if one is not as ``bundle.json`` says."""
        for entry in self.files():
            self.open_path(entry)

    def open_path(self, entry: FileEntry) -> Path:
        """A file's path after checking its hash; a BundleError if it is missing or altered."""
        location = self._locate(entry)
        sha256 = sha256_of(location)
        if sha256 != entry.sha256:
            raise BundleError(
                f"{location}: expected sha256 {entry.sha256[:12]}..., got {sha256[:12]}.... "
                "The file was altered or damaged; copy the bundle again."
            )
        return location

    def variants(self, name: str) -> tuple[str, ...]:
        """The precisions in which the bundle holds a graph; a BundleError if it has none."""
        variants = self.graphs.get(name)
        if not variants:
            raise BundleError(f"{self.path / MANIFEST}: graphs: missing key {name!r}")
        return tuple(variants)

    def graph(self, name: str, variant: str) -> GraphEntry:
        """A graph in one of its :meth:`variants`; PrecisionNotApplied if it has another."""
        variants = self.variants(name)
        if variant not in variants:
            raise PrecisionNotApplied(
                f"precision: expected one that {self.path.name} holds for {name} "
                f"({', '.join(variants)}), got {variant!r}. Use one of these."
            )
        return self.graphs[name][variant]

    def asked_of(self, name: str, precision: str) -> str:
        """The precision to ask of a graph; ``"auto"`` where only others have layers in 8 bits."""
        narrow = any(precision in variants for variants in self.graphs.values())
        left = precision in NARROW and narrow and precision not in self.variants(name)
        return "auto" if left else precision

    def auto_precisions(self, usual: tuple[str, ...]) -> tuple[str, ...]:
        """Precisions that ``"auto"`` may take: ``usual``, and INT8 if its own gate passed."""
        int8 = self.quantization.get("int8")
        return ("int8", *usual) if int8 is not None and int8.passed else usual

    def check_sizes(self, tensors: Iterable[TensorSpec]) -> None:
        """Refuse a manifest whose sizes differ from the image encoder's inputs and outputs."""
        gives = {spec.name: spec.shape for spec in tensors}
        grid_h, grid_w = self.head.grid_hw
        stated = {
            "preprocess.size_hw": ("image", 2, self.preprocess.size_hw),
            "head.grid_hw": ("patch_embeds", 1, (grid_h * grid_w,)),
        }
        for key, (name, axis, sizes) in stated.items():
            shape = gives.get(name, ())[axis : axis + len(sizes)]
            if any(isinstance(a, int) and a != b for a, b in zip(shape, sizes, strict=False)):
                raise BundleError(
                    f"{self.path / 'bundle.json'}: {key}: expected the sizes of the graph's "
                    f"{name}, {list(gives[name])}, got {sizes}. Export the bundle again."
                )

    def to_manifest(self) -> dict[str, Any]:
        """The content of ``bundle.json`` as plain data."""
        data: dict[str, Any] = schema.encode(self)
        del data["path"]
        for key in [key for key, value in data.items() if value is None and key not in _WRITTEN]:
            del data[key]
        if not self.quantization:
            del data["quantization"]
        for narrow in data.get("quantization", {}).values():
            if narrow["masks"] is None:
                del narrow["masks"]
        for key, usual in _LEFT_OUT.items():
            if data["head"][key] == usual:
                del data["head"][key]
        return data

    def _locate(self, entry: FileEntry) -> Path:
        relative = PurePosixPath(entry.file)
        where = self.path / MANIFEST
        if relative.is_absolute() or ".." in relative.parts or "\\" in entry.file:
            raise BundleError(
                f"{where}: file: expected a path inside the bundle, got {entry.file!r}. "
                "Do not use bundles from sources you do not trust."
            )
        try:
            return self._existing(self.path / relative, entry)
        except OSError as exc:
            raise BundleError(f"{where}: file: cannot be read: {exc}. Copy it again.") from exc

    def _existing(self, location: Path, entry: FileEntry) -> Path:
        if not location.is_file():
            raise BundleError(f"{location}: file named in {MANIFEST} is missing. Copy it again.")
        if not location.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(
                f"{location}: expected a file inside the bundle, got a link out of it"
            )
        size = location.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{location}: expected {entry.bytes} bytes, got {size}. Copy the bundle again."
            )
        return location

    def _check_family(self) -> None:
        where = self.path / MANIFEST
        if self.family not in FAMILIES:
            raise BundleError(
                f"{where}: family: expected one of {', '.join(FAMILIES)}, got {self.family!r}. "
                "Update zsseg_rt if the bundle was made by a newer version."
            )
        family = FAMILIES[self.family]
        graphs = family.graphs
        if self.regions is not None and self.regions.encoder is not None:
            graphs += ("region_encoder",)
        for name in graphs:
            self.variants(name)
        for key, usual, value, is_free in (
            ("head.align", "half_pixel", self.head.align, family.has_class_logits),
            ("preprocess.resize", "stretch", self.preprocess.resize, "windows" in family.settings),
        ):
            if value != usual and not is_free:
                raise BundleError(
                    f"{where}: {key}: expected {usual!r} in family {self.family!r}, got "
                    f"{value!r}. Export the bundle again."
                )
        for key in family.keys:
            if getattr(self, key) is None:
                raise BundleError(f"{where}: missing key {key!r}")

    def _check_tensors(self) -> None:
        where, dtypes = self.path / MANIFEST, dict[tuple[str, str], str]()
        halves = FAMILIES[self.family].half_tensors
        for name, variants in self.graphs.items():
            for variant, entry in variants.items():
                for spec in (*entry.inputs, *entry.outputs):
                    key = f"{where}: graphs.{name}.{variant}: {spec.name}"
                    allowed = _DTYPES + (HALF_PRECISIONS if spec.name in halves else ())
                    if spec.dtype not in allowed:
                        raise BundleError(
                            f"{key}: expected {' or '.join(allowed)} in family {self.family!r}, "
                            f"got {spec.dtype!r}. Export the bundle again."
                        )
                    other = dtypes.setdefault((variant, spec.name), spec.dtype)
                    if spec.dtype != other:
                        raise BundleError(
                            f"{key}: expected {other}, as in another graph, got {spec.dtype}. "
                            "Export the bundle again."
                        )


def _read_manifest(root: Path) -> Any:
    where = root / MANIFEST
    try:
        if not root.exists():
            raise BundleError(f"{root}: expected a bundle folder, found nothing. Check the path.")
        if not where.is_file():
            raise BundleError(f"{root}: expected a bundle folder with {MANIFEST}, found none.")
        raw = schema.parse_json(read_limited(where, max_bytes=MAX_MANIFEST_BYTES))
    except OSError as exc:
        raise BundleError(f"{where}: cannot be read: {exc}. Check the path.") from exc
    except ValueError as exc:
        raise BundleError(f"{where}: expected JSON, got {exc}. Copy the bundle again.") from exc
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{where}: format_version: expected an integer >= 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise BundleVersionError(
            f"{where}: format_version: expected <= {FORMAT_VERSION}, got {version}. "
            "Update zsseg_rt."
        )
    if "path" in raw:
        raise BundleError(f"{where}: unknown key 'path'. Remove it: the folder says where it is.")
    return raw
