"""A machine with a GPU, of stand-ins: its tools on the path, its Python packages, its checkout."""

import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from support.computing_tensorrt import MODULE

ROOT = Path(__file__).resolve().parents[2]
EMULATED = sorted(
    ROOT.glob("build/*/cpp_tests/cuda_emulation/_C*.so"), key=lambda file: file.stat().st_mtime
)
TOOLS = {
    "nvidia-smi": """
case "$*" in
  -L) echo "GPU 0: Stand-in (UUID: GPU-0)" ;;
  *--query-gpu=compute_cap*) echo "8.7" ;;
  *--query-gpu=driver_version,*) echo "999.10, 1200, [N/A], 1980, 3201, 99.50, 700.00, 41, 512" ;;
  *) exit 2 ;;
esac""",
    "nvcc": "exit 0",
    "cmake": '[[ "$1 $3 $4" == "--build --target zsseg_cuda_tests" ]]',
    # Wants a program as the tool does, and fails as the tool does where it finds something.
    "compute-sanitizer": """
[[ "$1 $3 $4" == "--tool --error-exitcode 9" ]] || exit 2
[ "$2" != racecheck ] || { echo "a hazard"; exit 9; }
[ -x "$5" ]""",
    # The profilers run what they are given, and write as the tools do.
    "nsys": """
if [ "$1" = stats ]; then
  printf 'Processing...\\nTime (%%),Instances,Name\\n60.0,3,gemm\\n40.0,1,"overlay<a, b>"\\n'
  exit
fi
for word; do case "$word" in --output=*) file=${word#--output=} ;; esac; done
while [[ "$1" != */gpu_target.py ]]; do last=$1; shift; done
"$last" "$@" && echo seen > "$file" """,
    "ncu": """
for word; do case "$word" in --log-file=*) file=${word#--log-file=} ;; esac; done
while [[ "$1" != */gpu_target.py ]]; do last=$1; shift; done
"$last" "$@" || exit 1
echo '==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","us","register/thread"
"0","overlay","5.1","40"' > "$file" """,
}
SETUP = """
import os, sys
assert sys.argv[1:] == ["build_ext", "--inplace"]
assert os.environ["ZSSEG_CUDA"] == "ON" and os.environ["ZSSEG_CUDA_ARCHITECTURES"] == "87"
print("built")
"""
# Packages that are installed here, but not on that machine.
HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def write_program(folder: Path, name: str, text: str) -> Path:
    """A program for the shell."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(0o755)
    return file


def copy_checkout(root: Path) -> Path:
    """A copy of this project whose extension's CUDA is emulated, and whose build does nothing."""
    leave_out = shutil.ignore_patterns("__pycache__", "_C*.so", "*-20*.json")  # records
    for folder in ("zsseg_rt", "tools", "benchmarks", "python_tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=leave_out)
    shutil.copy2(ROOT / "pyproject.toml", root)
    shutil.copy2(EMULATED[-1], root / "zsseg_rt")
    (root / "setup.py").write_text(SETUP)
    return root


class Machine:
    """Where ``gpu_check.sh`` runs."""

    def __init__(
        self,
        checkout: Path,
        folder: Path,
        *,
        tools: Collection[str] = tuple(TOOLS),
        tensorrt: bool = False,
        hidden: Collection[str] = (),
    ) -> None:
        self.out, self.work = folder / "out", folder / "work"
        self._script = checkout / "tools" / "gpu_check.sh"
        packages = folder / "packages"
        packages.mkdir(parents=True)
        for name in tools:
            write_program(folder / "bin", name, TOOLS[name])
        hiding = HIDING.format(hidden=(*hidden, *(() if tensorrt else ("tensorrt",))))
        (packages / "sitecustomize.py").write_text(hiding)
        if tensorrt:
            (packages / "tensorrt").mkdir()
            text = MODULE.format(tests=str(checkout / "python_tests"))
            (packages / "tensorrt" / "__init__.py").write_text(text)
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(packages),
            "ZSSEG_PYTHON": sys.executable,
            "ZSSEG_EXTENSION": "",
            "CUDA_HOME": str(folder / "none"),
        }

    def check(self, *options: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a check to its end."""
        command = ["bash", self._script, "--out", self.out, "--work", self.work, *options]
        return subprocess.run(
            [str(word) for word in command], env=self.environment | environment, text=True,
            capture_output=True, timeout=480, check=False,
        )  # fmt: skip
