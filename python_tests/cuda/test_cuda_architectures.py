"""Whether a build holds CUDA, and for which GPUs: named, found, else one of each generation."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    found = shutil.which("cmake")
    if found is None:
        pytest.skip("cmake is not on the PATH")
    return found


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
