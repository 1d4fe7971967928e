"""The CUDA build without a GPU: for which GPUs, by CUDA 12.6, with how many resources a kernel."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# --- whether a build holds CUDA, and for which GPUs: named, found, else one of each generation ----

CHOICE = ROOT / "csrc/cmake/cuda_architectures.cmake"
KNOWN = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
GENERATIONS = "75;80;90;100;120"
ALL = "75;80;86;87;89;90;100;110;120"

SCRIPT = """
include([[{choice}]])
zsseg_cuda_code_flags(flags)
message("FLAGS ${{flags}}")
"""


def program(path, output, code=0):
    lines = "\n".join(output)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\nexit {code}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# What a project would do with a compiler is left out.
WHETHER = """
set(CMAKE_MODULE_PATH [[{folder}]])
file(WRITE [[{folder}/CheckLanguage.cmake]]
  "macro(check_language language)\nset(CMAKE_CUDA_COMPILER [[{nvcc}]])\nendmacro()")
macro(enable_language language)
endmacro()
macro(find_package name)
endmacro()
include(csrc/cmake/cuda.cmake)
"""


class Machine:
    """A folder of stand-ins for nvcc and nvidia-smi, and a device tree."""

    def __init__(self, folder):
        self.folder = folder
        self.nvcc = program(folder / "nvcc", [f"sm_{arch}" for arch in KNOWN])
        self.tree = folder / "compatible"

    def has_gpus(self, *capabilities, code=0):
        program(self.folder / "nvidia-smi", capabilities, code)

    def is_board(self, chip):
        self.tree.write_bytes(b"nvidia,some-board\0" + chip.encode() + b"\0")

    def decides(self, cuda, nvcc):
        """Whether a build holds CUDA; what is printed must be one line that says so."""
        done = self.run_decision(cuda, nvcc)
        assert done.returncode == 0, done.stderr
        (said,) = done.stdout.splitlines()
        return said.removeprefix("-- zsseg: building for ")

    def run_decision(self, cuda, nvcc):
        text = WHETHER.format(folder=self.folder, nvcc=self.nvcc if nvcc else "")
        return self._run(text, f"-DZSSEG_CUDA={cuda}")

    def configure(self, wanted):
        return self._run(SCRIPT.format(choice=CHOICE), f"-DZSSEG_CUDA_ARCHITECTURES={wanted}")

    def _run(self, text, *settings):
        script = self.folder / "choose.cmake"
        script.write_text(text, encoding="utf-8")
        call = [cmake(), *settings, f"-DCMAKE_CUDA_COMPILER={self.nvcc}"]
        call += [f"-DZSSEG_DEVICE_TREE={self.tree}", f"-DZSSEG_DEVICES={self.folder}/devices"]
        # No folder of the system's, so that a real nvidia-smi is not found.
        call += ["-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF", "-P", str(script)]
        path = {"PATH": f"{self.folder}:{shell_tools(self.folder)}"}
        return subprocess.run(call, cwd=ROOT, env=path, capture_output=True, text=True, check=False)

    def builds(self, wanted="AUTO"):
        """Architectures of machine code, those of PTX, and all that was said."""
        done = self.configure(wanted)
        assert done.returncode == 0, done.stderr
        (flags,) = (line for line in done.stderr.splitlines() if line.startswith("FLAGS "))
        codes = [flag.rsplit("code=", 1)[1] for flag in flags[6:].split(";")]
        machine = ";".join(code[3:] for code in codes if code.startswith("sm_"))
        ptx = ";".join(code[8:] for code in codes if code.startswith("compute_"))
        return machine, ptx, done.stdout


def cmake():
    path = shutil.which("cmake")
    if path is None:
        pytest.skip("cmake is not on the PATH")
    return path


def shell_tools(folder):
    """A folder that has what the stand-ins call, and nothing else."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("sh", "cat"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name))
    return tools


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


@pytest.mark.parametrize(
    ("chip", "expected"), [("nvidia,tegra234", "87"), ("nvidia,tegra264", "110")]
)
def test_auto_knows_jetsons_whose_nvidia_smi_does_not_tell(machine, chip, expected):
    machine.is_board(chip)
    machine.has_gpus("[N/A]")
    assert machine.builds()[0] == expected


def test_named_ones_are_built_whatever_is_there(machine):
    machine.has_gpus("8.6")
    assert machine.builds("87;110")[0] == "87;110"
    assert machine.builds("ALL")[:2] == (ALL, "75;120")


def test_named_ones_that_the_compiler_does_not_know_are_dropped_aloud(machine):
    program(machine.nvcc, ["sm_75", "sm_86"])
    code, _, said = machine.builds("ALL")
    assert code == "75;86"
    assert "does not know sm_120; dropped" in said


@pytest.mark.parametrize("wanted", ["99", "sm_86", "60", "auto", ""])
def test_names_of_no_gpu_are_refused(machine, wanted):
    done = machine.configure(wanted)
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


@pytest.mark.parametrize("sign", ["nvidia0", "nvgpu", "board"])
def test_gpus_are_found_where_nvidia_smi_does_not_tell(machine, sign):
    (machine.folder / "devices").mkdir()
    if sign == "board":
        machine.is_board("nvidia,tegra234")
    else:
        (machine.folder / "devices" / sign).touch()
    assert machine.decides("AUTO", nvcc=True).startswith("CPUs and NVIDIA GPUs")


def test_cuda_that_is_asked_for_and_cannot_be_built_is_an_error(machine):
    done = machine.run_decision("ON", nvcc=False)
    assert "ZSSEG_CUDA=ON, but no CUDA compiler was found" in done.stderr


# --- the kernels compile with the CUDA 12.6 of JetPack 6, by NVRTC: its toolkit is not needed -----


STAND_INS = ROOT / "cpp_tests" / "nvrtc"
SOURCES = sorted((ROOT / "csrc" / "zsseg" / "ops").glob("*_cuda.cu"))
HEADERS = (
    *("algorithm", "array", "cfloat", "cmath", "cstddef", "cstdint", "cstring"),
    *("initializer_list", "limits", "string", "type_traits", "utility", "vector"),
    *("cuda_runtime.h", "cuda_runtime_api.h"),
)
# A source is compiled again once it, or a header, changes.
SHARED = [*sorted(STAND_INS.rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.h")), Path(__file__)]
COMPILED = Path(os.environ.get("ZSSEG_TEST_CACHE") or ROOT / "build") / "nvrtc"


def folders(package: str, folder: str) -> list[Path]:
    """Where one of NVIDIA's packages has its files; none where it is not installed."""
    try:
        spec = find_spec(f"nvidia.{package}")
    except ModuleNotFoundError:
        spec = None
    return [Path(place) / folder for place in spec.submodule_search_locations] if spec else []


OPTIONS = [
    "--gpu-architecture=sm_87",
    "--std=c++17",
    "--device-as-default-execution-space",
    *(
        f"--include-path={folder}"
        for folder in (STAND_INS, ROOT / "csrc", *folders("cuda_runtime", "include"))
    ),
]


class Nvrtc:
    """NVIDIA's compiler for running programs."""

    def __init__(self, path: Path):
        self._library = ctypes.CDLL(str(path))

    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def compile(self, source: str, name: str, options: list[str]) -> tuple[bytes, str]:
        """Return machine code, empty where there are errors, and what the compiler says."""
        program = ctypes.c_void_p()
        headers = [header.encode() for header in HEADERS]
        contents = [b'#include "host_api.h"\n'] * len(headers)
        strings = ctypes.c_char_p * len(headers)
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(headers),
            strings(*contents),
            strings(*headers),
        )
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = self._library.nvrtcCompileProgram(program, len(options), flags)
        log = self._get("ProgramLog", program).rstrip(b"\0").decode()
        code = b"" if failed else self._get("CUBIN", program)
        self._call("nvrtcDestroyProgram", ctypes.byref(program))
        return code, log

    def _get(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        assert status == 0, f"{name} failed with {status}"


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    libraries = [
        path for folder in folders("cuda_nvrtc", "lib") for path in folder.glob("libnvrtc.so.12")
    ]
    if not libraries:
        pytest.skip("no NVRTC of CUDA 12; tools/test.sh installs it")
    compiler = Nvrtc(libraries[0])
    if compiler.version() != (12, 6):
        pytest.skip(f"expected NVRTC 12.6, got {compiler.version()}; tools/test.sh installs it")
    return compiler


def kernels_of(source: str) -> set[str]:
    bounds = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
    return set(re.findall(rf"__global__ void\s+(?:{bounds}\s+)?(\w+)\(", source))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_kernel_compiles_for_orin(nvrtc, source):
    content = b"".join(path.read_bytes() for path in [*SHARED, source])
    compiled = COMPILED / hashlib.sha256(content).hexdigest()
    if compiled.exists():
        return
    text = source.read_text(encoding="utf-8")
    code, log = nvrtc.compile(text, source.name, OPTIONS)
    assert code, log
    kernels = kernels_of(text)
    assert kernels
    assert [name for name in sorted(kernels) if name.encode() not in code] == []
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


@pytest.mark.parametrize(
    ("prefix", "share"), [("label_kernel", 0.5), ("label_overlay_kernel", 0.0)]
)
def test_labelling_keeps_its_share_of_warps_busy_without_local_memory(tool, prefix, share):
    for arch, kernels in table(tool).items():
        labelling = {name: each for name, each in kernels.items() if name.startswith(prefix)}
        assert len(labelling) == 6
        for name, figures in labelling.items():
            assert figures["warps"] >= share * tool.LIMITS[arch][0], (arch, name)
            local = ("stack", "spill_stores", "spill_loads", "ldl", "stl")
            assert [figures.get(key, 0) for key in local] == [0] * 5, (arch, name)
