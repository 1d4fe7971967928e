"""Kernels take no more registers, stack, shared memory or local memory than the table says."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    ROOT.glob("build/*/cpp_tests/cuda_emulation/zsseg_cuda_tests_emulated"),
    key=lambda file: file.stat().st_mtime,
)
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z12label_kernelIhEvPT_' for 'sm_87'
ptxas info    : Function properties for _Z12label_kernelIhEvPT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 16 bytes cumulative stack size, 21896 bytes smem
ptxas info    : Compiling entry function '_Z11copy_kernelv' for 'sm_87'
ptxas info    : Function properties for _Z11copy_kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 15 registers, used 0 barriers
"""


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import cuda_resources

    return cuda_resources


def table(tool):
    return json.loads(tool.TABLE.read_text())


@pytest.mark.parametrize(
    "architectures", [["87"], pytest.param(["75", "90"], marks=pytest.mark.nightly)]
)
def test_no_kernel_takes_more_than_the_table_says(tool, capsys, architectures):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    assert tool.main(architectures) == 0, capsys.readouterr().out


def test_every_kernel_of_the_table_is_launched_by_the_program(tool):
    """So that compute-sanitizer sees each of them."""
    if not PROGRAMS:
        pytest.skip("zsseg_cuda_tests is not built for the emulated GPU; tools/test.sh builds it")
    done = subprocess.run([PROGRAMS[-1]], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    launched = re.search(r"^(\d+) kernels launched$", done.stdout, re.MULTILINE)
    assert {arch: len(kernels) for arch, kernels in table(tool).items()} == dict.fromkeys(
        tool.LIMITS, int(launched[1])
    )


def test_what_ptxas_prints_is_read(tool):
    found = tool.read_ptxas(PTXAS, "87")
    assert found == {
        "_Z12label_kernelIhEvPT_": {
            "registers": 72,
            "stack": 16,
            "spill_stores": 8,
            "spill_loads": 4,
            "shared": 21896,
            "warps": 28,  # 7 blocks of 4 warps, by shared memory: 164 KB in shares of 22.4
        },
        "_Z11copy_kernelv": {
            "registers": 15,
            "stack": 0,
            "spill_stores": 0,
            "spill_loads": 0,
            "shared": 0,
            "warps": 48,
        },
    }


@pytest.mark.parametrize(
    ("line", "counted"),
    [
        ("/*0a0*/ HMMA.16816.F32 R4, R8, R12, R4 ;", ["hmma"]),
        ("/*0a0*/ HFMA2.MMA R5, -RZ, RZ, 1.875, 0 ;", []),  # a constant, no matrix product
        ("/*0a0*/ @P0 LDL R5, [R1+0x8] ;", ["ldl"]),
        ("/*0a0*/ STL.64 [R1], R4 ;", ["stl"]),
        ("/*0a0*/ LDG.E.128.CONSTANT R4, [R2.64] ;", ["wide_loads"]),
        ("/*0a0*/ LDS.128 R4, [R2] ;", ["wide_loads"]),
        ("/*0a0*/ LDS.64 R4, [R2] ;", []),
    ],
)
def test_instructions_are_told_apart(tool, line, counted):
    assert [name for name, pattern in tool.INSTRUCTIONS.items() if pattern.search(line)] == counted


def test_labelling_keeps_half_the_warps_of_a_multiprocessor_busy(tool):
    """With nothing in local memory."""
    for arch, kernels in table(tool).items():
        labelling = {
            name: each for name, each in kernels.items() if name.startswith("label_kernel")
        }
        assert len(labelling) == 6
        for name, figures in labelling.items():
            assert 2 * figures["warps"] >= tool.LIMITS[arch][0], (arch, name)
            local = ("stack", "spill_stores", "spill_loads", "ldl", "stl")
            assert [figures.get(key, 0) for key in local] == [0] * 5, (arch, name)


def test_drawing_beside_the_labels_needs_no_local_memory(tool):
    for arch, kernels in table(tool).items():
        drawing = {k: v for k, v in kernels.items() if k.startswith("label_overlay_kernel")}
        assert len(drawing) == 6
        for name, figures in drawing.items():
            local = ("stack", "spill_stores", "spill_loads", "ldl", "stl")
            assert [figures.get(key, 0) for key in local] == [0] * 5, (arch, name)


@pytest.mark.parametrize("name", ["registers", "stack", "spill_loads", "shared", "warps", "ldl"])
def test_the_table_may_only_improve(tool, name):
    held = {"87": {"kernel": dict.fromkeys((*tool.LESS_IS_BETTER, *tool.MORE_IS_BETTER), 8)}}
    assert tool.compare(held, held) == []
    for change, is_worse in ((1, name != "warps"), (-1, name == "warps")):
        found = copy.deepcopy(held)
        found["87"]["kernel"][name] += change
        said = [f"sm_87 kernel: {name} expected 8 or better, got {8 + change}"]
        assert tool.compare(held, found) == (said if is_worse else [])


def test_kernels_that_come_and_go_are_said(tool):
    held = {"87": {"old": {"registers": 1}}}
    (new, old) = tool.compare(held, {"87": {"new": {"registers": 1}}})
    assert "sm_87 new: not in the table" in new
    assert "sm_87 old: not in the sources" in old
