"""The CUDA build without a GPU: for which GPUs, by CUDA 12.6, with how many resources a kernel."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# --- whether a build holds CUDA, and for which GPUs: named, found, else one of each generation ----

KNOWN = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
GENERATIONS = "75;80;90;100;120"
ALL = "75;80;86;87;89;90;100;110;120"

CHOICE = """
include(csrc/cmake/cuda_architectures.cmake)
zsseg_cuda_code_flags(flags)
message("FLAGS ${flags}")
"""
# What a project would do with a compiler is left out.
WHETHER = """
set(CMAKE_MODULE_PATH ${FOLDER})
file(WRITE ${FOLDER}/CheckLanguage.cmake
  "macro(check_language language)\nset(CMAKE_CUDA_COMPILER [[${NVCC}]])\nendmacro()")
macro(enable_language language)
endmacro()
macro(find_package name)
endmacro()
include(csrc/cmake/cuda.cmake)
"""


class Machine:
    """A folder of stand-ins for nvcc and nvidia-smi, and a device tree."""

    def __init__(self, folder):
        self.folder, self.tree = folder, folder / "compatible"
        self.nvcc = self.program("nvcc", [f"sm_{arch}" for arch in KNOWN])
        for name in ("sh", "cat"):  # what the stand-ins call, and nothing else
            (folder / name).symlink_to(shutil.which(name))

    def program(self, name, output, code=0):
        path, lines = self.folder / name, "\n".join(output)
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\nexit {code}\n")
        path.chmod(0o755)
        return path

    def has_gpus(self, *capabilities, code=0):
        self.program("nvidia-smi", capabilities, code)

    def is_board(self, chip):
        self.tree.write_bytes(b"nvidia,some-board\0" + chip.encode() + b"\0")

    def run(self, text, **settings):
        cmake = shutil.which("cmake") or pytest.skip("cmake is not on the PATH")
        (self.folder / "choose.cmake").write_text(text)
        settings |= {"FOLDER": self.folder, "CMAKE_CUDA_COMPILER": self.nvcc}
        settings |= {"ZSSEG_DEVICE_TREE": self.tree, "ZSSEG_DEVICES": self.folder / "devices"}
        # No folder of the system's, so that a real nvidia-smi is not found.
        settings["CMAKE_FIND_USE_CMAKE_SYSTEM_PATH"] = "OFF"
        call = [cmake, *(f"-D{name}={value}" for name, value in settings.items()), "-P"]
        call.append(self.folder / "choose.cmake")
        path = {"PATH": str(self.folder)}
        return subprocess.run(call, cwd=ROOT, env=path, capture_output=True, text=True, check=False)

    def decides(self, cuda, nvcc):
        """Whether a build holds CUDA; what is printed must be one line that says so."""
        done = self.run(WHETHER, ZSSEG_CUDA=cuda, NVCC=self.nvcc if nvcc else "")
        assert done.returncode == 0, done.stderr
        (said,) = done.stdout.splitlines()
        return said.removeprefix("-- zsseg: building for ")

    def builds(self, wanted="AUTO"):
        """Architectures of machine code, those of PTX, and all that was said."""
        done = self.run(CHOICE, ZSSEG_CUDA_ARCHITECTURES=wanted)
        assert done.returncode == 0, done.stderr
        (flags,) = (line for line in done.stderr.splitlines() if line.startswith("FLAGS "))
        codes = [flag.rsplit("code=", 1)[1] for flag in flags[6:].split(";")]
        machine = ";".join(code[3:] for code in codes if code.startswith("sm_"))
        ptx = ";".join(code[8:] for code in codes if code.startswith("compute_"))
        return machine, ptx, done.stdout


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("gpus", "expected", "ptx"),
    [
        (["8.6"], "86", "75;86"),
        (["8.9", "8.9", "8.6"], "86;89", "75;89"),
        (["12.0", "9.0"], "90;120", "75;120"),
        (["7.5"], "75", "75"),
        (["12.1"], "121", "75;121"),
        (["6.1", "8.0"], "80", "75;80"),
        # none that can be built for: one of each generation
        *[(gpus, GENERATIONS, "75;120") for gpus in (None, [], ["6.1"], ["13.0"], ["[N/A]"])],
    ],
)
def test_auto_builds_for_the_gpus_that_are_there(machine, gpus, expected, ptx):
    if gpus is not None:
        machine.has_gpus(*gpus)
    *codes, said = machine.builds()
    assert codes == [expected, ptx]
    assert ("no GPU to build for was found here" in said) == (expected == GENERATIONS)
    assert ("ZSSEG_CUDA_ARCHITECTURES names others" in said) == (expected == GENERATIONS)
    machine.has_gpus("NVIDIA-SMI has failed, driver 535.54", code=9)
    assert machine.builds()[0] == GENERATIONS


def test_auto_knows_jetsons_whose_nvidia_smi_does_not_tell(machine):
    machine.has_gpus("[N/A]")
    for chip, expected in (("nvidia,tegra234", "87"), ("nvidia,tegra264", "110")):
        machine.is_board(chip)
        assert machine.builds()[0] == expected


def test_named_ones_are_built_whatever_is_there(machine):
    machine.has_gpus("8.6")
    assert machine.builds("87;110")[0] == "87;110"
    assert machine.builds("ALL")[:2] == (ALL, "75;120")
    machine.program("nvcc", ["sm_75", "sm_86"])
    code, _, said = machine.builds("ALL")
    assert code == "75;86"
    assert "does not know sm_120; dropped" in said
    for wanted in ("99", "sm_86", "60", "auto", ""):
        done = machine.run(CHOICE, ZSSEG_CUDA_ARCHITECTURES=wanted)
        assert done.returncode != 0
        said = " ".join(done.stderr.split())
        assert "ZSSEG_CUDA_ARCHITECTURES: expected AUTO, ALL or at least one of sm_75" in said


def test_cuda_is_built_where_a_gpu_and_a_compiler_are(machine):
    assert "no NVIDIA GPU was found here; ZSSEG_CUDA=ON" in machine.decides("AUTO", nvcc=True)
    assert machine.decides("ON", nvcc=True) == f"CPUs and NVIDIA GPUs, with {machine.nvcc}"
    machine.has_gpus("8.6")
    assert machine.decides("AUTO", nvcc=True) == f"CPUs and NVIDIA GPUs, with {machine.nvcc}"
    assert "but no CUDA compiler; put nvcc on PATH" in machine.decides("AUTO", nvcc=False)
    assert machine.decides("OFF", nvcc=True) == "CPUs alone (ZSSEG_CUDA=OFF)"
    done = machine.run(WHETHER, ZSSEG_CUDA="ON", NVCC="")
    assert "ZSSEG_CUDA=ON, but no CUDA compiler was found" in done.stderr


@pytest.mark.parametrize("sign", ["nvidia0", "nvgpu", "board"])
def test_gpus_are_found_where_nvidia_smi_does_not_tell(machine, sign):
    (machine.folder / "devices").mkdir()
    if sign == "board":
        machine.is_board("nvidia,tegra234")
    else:
        (machine.folder / "devices" / sign).touch()
    assert machine.decides("AUTO", nvcc=True).startswith("CPUs and NVIDIA GPUs")


# --- the kernels compile with the CUDA 12.6 of JetPack 6, by NVRTC: its toolkit is not needed -----


SOURCES = sorted((ROOT / "csrc" / "zsseg" / "ops").glob("*_cuda.cu"))
STAND_INS = ROOT / "cpp_tests" / "nvrtc"  # of these headers
HEADERS = """
algorithm array cfloat cmath cstddef cstdint cstring initializer_list limits string type_traits
utility vector cuda_runtime.h cuda_runtime_api.h
"""
# A source is compiled again once it, or a header, changes.
SHARED = [*sorted(STAND_INS.rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.h")), Path(__file__)]
COMPILED = Path(os.environ.get("ZSSEG_TEST_CACHE") or ROOT / "build") / "nvrtc"


def folders(package, folder):
    """Where one of NVIDIA's packages has its files; none where it is not installed."""
    try:
        spec = find_spec(f"nvidia.{package}")
    except ModuleNotFoundError:
        spec = None
    return [Path(place) / folder for place in spec.submodule_search_locations] if spec else []


class Nvrtc:
    """NVIDIA's compiler for running programs."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))

    def version(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, source, name):
        """Return machine code, empty where there are errors, and what the compiler says."""
        includes = (STAND_INS, ROOT / "csrc", *folders("cuda_runtime", "include"))
        options = ["--gpu-architecture=sm_87", "--std=c++17", "--device-as-default-execution-space"]
        options += [f"--include-path={folder}" for folder in includes]
        program, headers = ctypes.c_void_p(), HEADERS.encode().split()
        names = (ctypes.c_char_p * len(headers))(*headers)
        contents = type(names)(*[b'#include "host_api.h"\n'] * len(headers))
        text = (source.encode(), name.encode(), len(headers), contents, names)
        self._call("CreateProgram", ctypes.byref(program), *text)
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = self._library.nvrtcCompileProgram(program, len(options), flags)
        log = self._get("ProgramLog", program).rstrip(b"\0").decode()
        code = b"" if failed else self._get("CUBIN", program)
        self._call("DestroyProgram", ctypes.byref(program))
        return code, log

    def _get(self, what, program):
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, text)
        return text.raw

    def _call(self, name, *arguments):
        status = getattr(self._library, f"nvrtc{name}")(*arguments)
        assert status == 0, f"{name} failed with {status}"


@pytest.fixture(scope="module")
def nvrtc():
    libraries = [
        path for folder in folders("cuda_nvrtc", "lib") for path in folder.glob("libnvrtc.so.12")
    ]
    if not libraries or Nvrtc(libraries[0]).version() != (12, 6):
        pytest.skip("no NVRTC of CUDA 12.6; tools/test.sh installs it")
    return Nvrtc(libraries[0])


BOUNDS = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
KERNEL = re.compile(rf"__global__ void\s+(?:{BOUNDS}\s+)?(\w+)\(")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_compiles_for_orin(nvrtc, source):
    content = b"".join(path.read_bytes() for path in [*SHARED, source])
    compiled = COMPILED / hashlib.sha256(content).hexdigest()
    if compiled.exists():
        return
    text = source.read_text(encoding="utf-8")
    code, log = nvrtc.compile(text, source.name)
    assert code, log
    kernels = KERNEL.findall(text)
    assert kernels
    assert [name for name in kernels if name.encode() not in code] == []
    COMPILED.mkdir(parents=True, exist_ok=True)
    compiled.touch()


# --- registers, stack, shared and local memory: no more than the table says -----------------------


PROGRAMS = sorted(
    ROOT.glob("build/*/cpp_tests/cuda_emulation/zsseg_cuda_tests_emulated"),
    key=lambda file: file.stat().st_mtime,
)


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import cuda_resources

    return cuda_resources


@pytest.fixture
def table(tool):
    return json.loads(tool.TABLE.read_text())


@pytest.mark.parametrize(
    "architectures", [["87"], pytest.param(["75", "90"], marks=pytest.mark.nightly)]
)
def test_no_kernel_takes_more_than_the_table_says(tool, capsys, architectures):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    assert tool.main(architectures) == 0, capsys.readouterr().out


def test_every_kernel_of_the_table_is_launched_by_the_program(tool, table):
    """So that compute-sanitizer sees each of them."""
    if not PROGRAMS:
        pytest.skip("zsseg_cuda_tests is not built for the emulated GPU; tools/test.sh builds it")
    done = subprocess.run([PROGRAMS[-1]], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    launched = re.search(r"^(\d+) kernels launched$", done.stdout, re.MULTILINE)
    assert {arch: len(kernels) for arch, kernels in table.items()} == dict.fromkeys(
        tool.LIMITS, int(launched[1])
    )


@pytest.mark.parametrize(
    ("prefix", "share"), [("label_kernel", 0.5), ("label_overlay_kernel", 0.0)]
)
def test_labelling_keeps_its_share_of_warps_busy_without_local_memory(tool, table, prefix, share):
    for arch, kernels in table.items():
        labelling = [each for name, each in kernels.items() if name.startswith(prefix)]
        assert len(labelling) == 6
        for figures in labelling:
            assert figures["warps"] >= share * tool.LIMITS[arch][0], (arch, figures)
            local = ("stack", "spill_stores", "spill_loads", "ldl", "stl")
            assert [figures.get(key, 0) for key in local] == [0] * 5, (arch, figures)
