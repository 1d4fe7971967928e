"""Builds the extension zsseg_rt._C with CMake; everything else is in pyproject.toml.

Environment: ZSSEG_CUDA (AUTO, ON, OFF), ZSSEG_CUDA_ARCHITECTURES (AUTO, ALL or such as "86;89";
docs/install.md), ZSSEG_WERROR (1 makes warnings errors), CMAKE_ARGS (further ones for CMake).
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FORWARDED = ("ZSSEG_CUDA", "ZSSEG_CUDA_ARCHITECTURES")


class CMakeBuild(build_ext):
    """Configures and builds the CMake target ``_C`` and copies it where setuptools wants it."""

    def run(self) -> None:
        self.for_wheel = not (self.inplace or self.editable_mode)  # setuptools resets both in run
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # One tree an interpreter, kept between in-place builds so that they are incremental.
        tree = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        if self.for_wheel:
            tree = tree.with_name(f"{tree.name}-wheel")
            shutil.rmtree(tree, ignore_errors=True)  # it may hold paths of a vanished build venv
        tree.mkdir(parents=True, exist_ok=True)
        with (tree / ".lock").open("w") as lock:  # two builds at once ruin each other's records
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._run("cmake", "-S", str(ROOT), "-B", str(tree), *self._configure_args())
            self._run("cmake", "--build", str(tree), "--target", "_C", *self._parallel_args())
        built = tree / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        _replace(built, Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            _replace(built, ROOT / self.get_ext_filename(ext.name))

    def _configure_args(self) -> list[str]:
        import pybind11

        ninja = shutil.which("ninja")
        args = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        args += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DZSSEG_WERROR={'ON' if os.environ.get('ZSSEG_WERROR') == '1' else 'OFF'}",
        ]
        args += [f"-D{name}={os.environ[name]}" for name in FORWARDED if name in os.environ]
        return args + shlex.split(os.environ.get("CMAKE_ARGS", ""))

    def _parallel_args(self) -> list[str]:
        return ["--parallel", str(self.parallel or len(os.sched_getaffinity(0)))]

    def _run(self, *command: str) -> None:
        self.announce(shlex.join(command), level=2)
        subprocess.run(command, check=True)


def _replace(source: Path, target: Path) -> None:
    """Copies under a temporary name first: a running interpreter may have the old file mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    shutil.copy2(source, partial)
    partial.replace(target)


setup(ext_modules=[Extension("zsseg_rt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
