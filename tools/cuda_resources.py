"""A GPU's resources that each CUDA kernel takes, by ptxas and the disassembler, against a table.

    python tools/cuda_resources.py [ARCHITECTURE...]    compare; exit status 1 if it became worse
    python tools/cuda_resources.py --write              write the table anew

Each .cu is compiled for Turing (75), Orin (87) and Hopper (90), or those named; no GPU is needed.
What was found is kept in build/, or in ZSSEG_TEST_CACHE, until a source or the compiler changes.
The table may only improve: fewer registers, less stack, spills and shared memory, more warps on a
multiprocessor.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Beside this file is profile.py, which must not be taken for Python's own module of that name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "cpp_tests" / "cuda_resources.json"
FORMAT = 2  # of what is kept; to be raised when something else is measured
CACHE = Path(os.environ.get("ZSSEG_TEST_CACHE") or ROOT / "build") / "cuda_resources"
SOURCES = sorted((ROOT / "csrc" / "zsseg" / "ops").glob("*_cuda.cu"))
# Of a multiprocessor, by architecture: warps, blocks, kilobytes of shared memory, and bytes of it
# that each block takes besides. Registers: 65536 each.
LIMITS = {"75": (32, 16, 64, 0), "87": (48, 32, 164, 1024), "90": (64, 32, 228, 1024)}
REGISTERS, REGISTERS_AT_ONCE = 65536, 256
THREADS = 256  # of a block, but for these kernels and types
OTHER_THREADS = {
    "begin_finite_kernel": 1,
    "SmallTile": 128,
    "label_kernel": 128,
    "label_overlay_kernel": 128,
    "merge_windows_kernel": 128,
    "warp_blend_kernel": 128,
}
# Dynamic shared memory is not known here: label_regions_kernel may have fewer warps than shown;
# label_kernel takes 16 bytes for 32 classes.
INSTRUCTIONS = {
    "hmma": re.compile(r"(?<![.\w])HG?MMA\b"),  # HFMA2.MMA is no matrix product
    "ldl": re.compile(r"\bLDL\b"),
    "stl": re.compile(r"\bSTL\b"),
    "wide_loads": re.compile(r"\bLD[GS][\w.]*\.128\b"),
}
LESS_IS_BETTER = ("registers", "stack", "spill_stores", "spill_loads", "shared", "ldl", "stl")
MORE_IS_BETTER = ("warps", "hmma", "wide_loads")

Found = dict[str, dict[str, dict[str, int]]]  # by architecture and kernel


def main(arguments: list[str] | None = None) -> int:
    """Compare or write; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table anew")
    parser.add_argument(
        "architectures", nargs="*", choices=[*LIMITS, []], metavar="ARCHITECTURE", default=[]
    )
    args = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc: expected it on PATH, got nothing. Install the CUDA toolkit.", file=sys.stderr)
        return 4
    architectures = list(LIMITS) if args.write or not args.architectures else args.architectures
    figures = measure_all(nvcc, architectures)
    if args.write:
        TABLE.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
        print(f"wrote {TABLE.relative_to(ROOT)}")
        return 0
    table = json.loads(TABLE.read_text())
    worse = compare({arch: table.get(arch, {}) for arch in architectures}, figures)
    print("\n".join(worse) or "no kernel takes more than the table says")
    return 1 if worse else 0


def compare(table: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """Lines on kernels that became worse; one that the table lacks counts as worse too.

    Figures of the disassembler are compared where both sides have them.
    """
    return list(_differences(table, figures))


def _differences(table: Mapping[str, Any], figures: Mapping[str, Any]) -> Iterator[str]:
    for arch in sorted({*table, *figures}):
        listed, taken = table.get(arch, {}), figures.get(arch, {})
        for kernel in sorted({*listed, *taken}):
            if kernel not in listed or kernel not in taken:
                where = "table" if kernel not in listed else "sources"
                yield f"sm_{arch} {kernel}: not in the {where}. Run with --write."
                continue
            for name in (*LESS_IS_BETTER, *MORE_IS_BETTER):
                if name not in listed[kernel] or name not in taken[kernel]:
                    continue
                before, after = listed[kernel][name], taken[kernel][name]
                if (after > before) if name in LESS_IS_BETTER else (after < before):
                    yield f"sm_{arch} {kernel}: {name} expected {before} or better, got {after}"


def measure_all(nvcc: str, architectures: Sequence[str]) -> Found:
    """Figures of every kernel on these architectures, from the cache where nothing changed."""
    dump = find_cuobjdump(nvcc)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    figures: Found = {arch: {} for arch in architectures}
    headers = sorted((ROOT / "csrc" / "zsseg").rglob("*.h"))
    shared = b"".join(path.read_bytes() for path in headers)
    CACHE.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        key = hashlib.sha256(
            shared + source.read_bytes() + f"{FORMAT}{version}{dump is None}".encode()
        )
        for arch in architectures:
            kept = CACHE / f"{source.stem}-{arch}-{key.hexdigest()[:32]}.json"
            if not kept.is_file():
                measured = json.dumps(measure(nvcc, dump, source, arch))
                partial = kept.with_suffix(f".{os.getpid()}")
                partial.write_text(measured)
                partial.replace(kept)
            figures[arch] |= json.loads(kept.read_text())
    return figures


def find_cuobjdump(nvcc: str) -> str | None:
    """The toolkit's disassembler, or the one inside the triton package; None without either."""
    beside = Path(nvcc).resolve().with_name("cuobjdump")
    if beside.is_file():
        return str(beside)
    triton = importlib.util.find_spec("triton")
    for folder in (triton and triton.submodule_search_locations) or ():
        file = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if file.is_file():
            return str(file)
    return shutil.which("cuobjdump")


def measure(nvcc: str, dump: str | None, source: Path, arch: str) -> dict[str, dict[str, int]]:
    """Compile one source for one architecture and read what the tools say."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / f"{arch}.cubin"
        command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-cubin", f"-arch=sm_{arch}"]
        command += ["-Xptxas", "-v", "-o", str(binary), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{source.name}: nvcc failed:\n{done.stderr}")
        kernels = read_ptxas(done.stderr, arch)
        for name, counts in count_instructions(dump, binary).items():
            kernels[name] |= counts
    return {readable(name): figures for name, figures in kernels.items()}


def read_ptxas(text: str, arch: str) -> dict[str, dict[str, int]]:
    """Figures by mangled name, from what ``-Xptxas -v`` prints."""
    kernels: dict[str, dict[str, int]] = {}
    for block in text.split("Compiling entry function '")[1:]:
        name = block[: block.index("'")]

        def number(pattern: str, block: str = block) -> int:
            match = re.search(pattern, block)
            return int(match[1]) if match else 0

        figures = {
            "registers": number(r"Used (\d+) registers"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spill_stores": number(r"(\d+) bytes spill stores"),
            "spill_loads": number(r"(\d+) bytes spill loads"),
            "shared": number(r"(\d+) bytes smem"),
        }
        figures["warps"] = resident_warps(arch, readable(name), figures)
        kernels[name] = figures
    return kernels


def resident_warps(arch: str, kernel: str, figures: Mapping[str, int]) -> int:
    """Warps that fit on a multiprocessor, by registers, shared memory and block size."""
    most, most_blocks, shared_kb, reserved = LIMITS[arch]
    words = re.split(r"\W+", kernel)
    threads = next((OTHER_THREADS[word] for word in words if word in OTHER_THREADS), THREADS)
    warps = -(-threads // 32)
    of_warp = -(-figures["registers"] * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    blocks = min(
        most // warps,
        REGISTERS // (of_warp * warps) if of_warp else most,
        shared_kb * 1024 // max(figures["shared"] + reserved, 1),
        most_blocks,
    )
    return blocks * warps


def count_instructions(dump: str | None, binary: Path) -> dict[str, dict[str, int]]:
    """Counts by mangled name; empty without a disassembler."""
    if dump is None:
        return {}
    done = subprocess.run([dump, "-sass", str(binary)], capture_output=True, text=True, check=True)
    kernels = {}
    for block in done.stdout.split("Function : ")[1:]:
        name, _, body = block.partition("\n")
        counts: Counter[str] = Counter(dict.fromkeys(INSTRUCTIONS, 0))
        for line in body.splitlines():
            for key, pattern in INSTRUCTIONS.items():
                counts[key] += bool(pattern.search(line))
        kernels[name.strip()] = dict(counts)
    return kernels


def readable(mangled: str) -> str:
    """``kernel<types>``, without the namespace, which depends on the file's path."""
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    text = done.stdout.strip()
    text = re.sub(r"\(anonymous namespace\)::|zsseg::|_GLOBAL__N__\w+::", "", text)
    match = re.match(r"(?:void )?(\w+(?:<[^(]*>)?)\(", text)
    return (
        match[1].replace("unsigned char", "uint8").replace("unsigned short", "uint16")
        if match
        else text
    )


if __name__ == "__main__":
    sys.exit(main())
