"""The table of docs/models.md: measured here, estimated for a Jetson, published, licensed.

    python benchmarks/models_table.py --json FILE [--only NAME ...] [--rounds 5]   # 10 minutes
    python benchmarks/models_table.py --tables FILE [FILE ...]  # write reports into the page
    python benchmarks/models_table.py --quick                   # small networks: it runs

Times are of ``Engine.segment`` with a frame of 640x480 and 20 classes; the engines of one network,
one for each precision that this CPU has, take turns. ViT-B/16 has random weights, which cost what
trained ones do. Reports of ``benchmarks/precision.py`` are read too; of a network and size that
stands in several, the last counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import precision
import small_encoders

from zsseg_rt import Bundle
from zsseg_rt.demo import demo_classes, demo_clip
from zsseg_rt.photos import decode_photo
from zsseg_rt.profiling.worker import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- models table", "<!-- end of models table -->"
JETSON_TERAFLOPS = {"Orin Nano Super": 17.0, "AGX Orin": 42.0}  # float16, without sparsity
JETSON_SHARE = 0.3


@dataclass(frozen=True)
class Row:
    """A model at one input size.

    Attributes:
        case: Its network in reports; empty: not measured.
        side: Side of the network's input, in pixels.
        gmac: Multiply-accumulates of a frame in 10^9, of which the Jetson's time follows; 0: none.
        shown: Its name on the page.
        published: The authors' mIoU, in per cent.
        licence: Of its weights.
        command: What makes the bundle.
    """

    case: str
    side: int
    gmac: float
    shown: str
    published: str
    licence: str
    command: str


def vit_gmac(side: int) -> float:
    """Of ViT-B/16: projections and MLPs of twelve blocks, and attention's two products."""
    tokens = (side // 16) ** 2 + 1
    return 12 * (12 * 768**2 * tokens + 2 * tokens**2 * 768) / 1e9


def fetched(name: str, case: str, side: int, published: str) -> Row:
    """A row of CLIP ViT-B/16, which is fetched by name."""
    size = "" if side == 448 else f" --size {side}"
    command = f"`zsseg-rt fetch {name}{size}`"
    return Row(case, side, vit_gmac(side), f"`{name}`", published, "Apache-2.0", command)


def small(name: str, case: str, side: int, gmac: float, imagenet: float, licence: str) -> Row:
    """A row of a smaller encoder, of whose labels nobody published a figure."""
    own = {"tinyclip-8m": 336, "tinyclip-39m": 448, "siglip2-b16": 256}.get(name, 384)
    command = f"`zsseg-rt fetch {name}{'' if side == own else f' --size {side}'}`"
    published = f"{_ABSENT}; ImageNet {imagenet} \u00b2"
    return Row(case, side, gmac, f"`{name}`", published, licence, command)


_ABSENT = "\u2013"
_IMPORT = "[import](#import-a-checkpoint)"
ROWS = (
    Row("photo_demo", 513, 0, "photo demo, 20 things", _ABSENT, "Apache-2.0", "ships: `--demo`"),
    small("tinyclip-8m", "tinyclip_8m", 224, 1.7, 41.1, "MIT"),
    small("tinyclip-8m", "tinyclip_8m", 336, 4.4, 41.1, "MIT"),
    small("tinyclip-8m", "tinyclip_8m", 448, 9.1, 41.1, "MIT"),
    small("tinyclip-39m", "tinyclip_39m", 224, 7.9, 63.5, "MIT"),
    small("tinyclip-39m", "tinyclip_39m", 336, 19.5, 63.5, "MIT"),
    small("tinyclip-39m", "tinyclip_39m", 448, 39.0, 63.5, "MIT"),
    small("pe-core-t16", "pe_core_t16", 384, 4.9, 62.1, "Apache-2.0"),
    small("pe-core-s16", "pe_core_s16", 384, 16.4, 72.7, "Apache-2.0"),
    small("siglip2-b16", "siglip2_b16", 256, 24.5, 79.1, "Apache-2.0"),
    fetched("naclip-b16", "dense_clip", 224, _ABSENT),
    fetched("naclip-b16", "dense_clip", 336, _ABSENT),
    fetched("naclip-b16", "dense_clip", 448, "VOC21 58.9, COCO-Object 33.2, ADE20K 17.4"),
    fetched("sfp-b16", "sfp", 448, "VOC21 63.9, COCO-Object 37.9, ADE20K 20.8"),
    Row("zegclip", 512, 110.2, "ZegCLIP", "VOC 91.9 seen, 77.8 unseen", "MIT", _IMPORT),
    Row("clip_rc", 512, 126.4, "CLIP-RC", "VOC 92.8 seen, 84.4 unseen", "none stated", _IMPORT),
    Row("", 384, 73.1, "CAT-Seg B", "VOC20 94.6, ADE20K 31.8 ¹", "MIT",
        "`zsseg-rt fetch cat-seg-b16`"),
    Row("", 448, 104, "TIPSv2 B/14", "ADE20K 17.4", "CC-BY 4.0", "`zsseg-rt fetch tipsv2-b14`"),
)  # fmt: skip


def demo_case(args: argparse.Namespace, folder: Path) -> Iterable[dict[str, Any]]:
    """The photo demo's network, with frames of its clip at 640x480."""
    photos = folder / "clip"
    photos.mkdir()
    for index, frame in enumerate(demo_clip()[:16]):
        image = cv2.resize(decode_photo(frame, Path(f"{index}.jpg")), (640, 480))
        cv2.imwrite(str(photos / f"{index:02d}.png"), image[..., ::-1])
    plain, names = folder / "demo.zsseg", demo_classes()
    plain.symlink_to(Bundle.demo().path)
    row, smaller = precision.quantised(plain, photos, names, ("int8",), precision.ANY)
    yield {"side": 513, **row, **precision.compared(smaller, photos, names, args)}


def _vit(build: Callable[..., Any], *sides: int) -> Callable[..., Iterable[dict[str, Any]]]:
    def case(args: argparse.Namespace, folder: Path) -> Iterable[dict[str, Any]]:
        args.sizes = sides
        yield from precision.random_case(build, args, folder, largest=("int8",))

    return case


SMALL = ("tinyclip_8m", "tinyclip_39m", "pe_core_t16", "pe_core_s16", "siglip2_b16")
CASES: Mapping[str, Callable[..., Iterable[dict[str, Any]]]] = {
    "photo_demo": demo_case,
    **{name: small_encoders.table_case(name) for name in SMALL},
    "dense_clip": _vit(precision.dense_clip, 448, 336, 224),
    "sfp": _vit(functools.partial(precision.dense_clip, head="sfp"), 448),
    "zegclip": _vit(precision.zegclip, 512),
    "clip_rc": _vit(precision.clip_rc, 512),
}


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, measure or write the page's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tables", type=Path, nargs="+", help="put these reports into the page")
    args = parser.parse_args(arguments)
    if args.tables:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), args.tables), encoding="utf-8")
        return 0
    watch, rows = Stopwatch(), list[dict[str, Any]]()
    report: dict[str, Any] = {
        "machine": precision.machine_and_commit(), "threads": args.threads, "rows": rows,
    }  # fmt: skip
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ZSSEG_HOME"] = str(Path(folder) / "cache")
            rows.extend({"case": name, **row} for row in CASES[name](args, Path(folder)))
        report |= {"load": os.getloadavg(), "seconds": watch.seconds}
        print(f"{name}: {rows[-1]['ms']}, {watch.seconds:.0f} s in all", file=sys.stderr)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(rows))
    return 0


def with_table(page: str, reports: Iterable[Path]) -> str:
    """The page with the table of these reports, whose names stand before it."""
    named = list(reports)
    read = [json.loads(path.read_text()) for path in named]
    rows = [row for report in read for row in report["rows"]]
    machines = [f"{report['threads']} threads of {report['machine']['cpu']}, commit "
                f"`{report['machine'].get('commit', 'not noted')}`" for report in read]  # fmt: skip
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    names = " ".join(path.name for path in named)
    measured = f"CPU times were measured on {'; '.join(dict.fromkeys(machines))}."
    return f"{before}{START}: {names} -->\n{table(rows)}\n\n{measured}\n{END}{after}"


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table, with a dash for what was not measured, estimated or published."""
    times = {(row["case"], row["side"]): row["ms"] for row in rows}
    lines = [
        "| model | input | CPU, ms: float32, bfloat16, INT8 | Jetson, ms [estimate] "
        "| published mIoU | licence | command |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        row_times = times.get((row.case, row.side), {})
        cpu = [_shown(row_times.get(kind)) for kind in ("float32", "bfloat16", "int8")]
        jetson = [
            f"{2 * row.gmac / (JETSON_SHARE * peak):.2g}" for peak in JETSON_TERAFLOPS.values()
        ]
        cells = [
            row.shown, f"{row.side}", ", ".join(cpu), ", ".join(jetson) if row.gmac else _ABSENT,
            row.published, row.licence, row.command,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(milliseconds: float | None) -> str:
    return _ABSENT if milliseconds is None else f"{float(f'{milliseconds:.3g}'):g}"


if __name__ == "__main__":
    sys.exit(main())
