"""Builds the extension zsseg_rt._C with CMake; everything else is in pyproject.toml.

Environment: ZSSEG_CUDA (AUTO, ON, OFF), ZSSEG_CUDA_ARCHITECTURES (AUTO, ALL or such as "86;89";
docs/install.md), ZSSEG_WERROR (1 makes warnings errors), CMAKE_ARGS (further ones for CMake),
ZSSEG_BUILD_CACHE (0 compiles even if the user's cache has the extension of exactly this source).
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.build import build
except ImportError:  # setuptools 61
    from distutils.command.build import build

ROOT = Path(__file__).resolve().parent
FORWARDED = ("ZSSEG_CUDA", "ZSSEG_CUDA_ARCHITECTURES")


class FreshBuild(build):
    """Begins with an empty folder: files that left the source must not come back in a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures and builds the CMake target ``_C`` and copies it where setuptools wants it."""

    def run(self) -> None:
        _check_needs()
        # setuptools, whose versions before 64 have no editable_mode, resets both in run.
        self.for_wheel = not (self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # One tree an interpreter, kept between in-place builds so that they are incremental.
        tree = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        if self.for_wheel:
            tree = tree.with_name(f"{tree.name}-wheel")
        tree.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        # Two builds at once ruin each other's records; beside the tree, which one may remove.
        with (tree.parent / f".{tree.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.for_wheel:
                self._build_once(tree, target)
            else:
                _replace(self._build(tree), target)

    def _build_once(self, tree: Path, target: Path) -> None:
        """Takes the extension from the cache, or builds it from nothing and keeps it there."""
        cache = BuildCache.of_user()
        key = source_key(bool(self.debug)) if cache else ""
        if cache and (data := cache.read(key)):
            print(f"zsseg: compiled before from this source, taken from {cache.folder}")
            _write(data, target)
            return
        shutil.rmtree(tree, ignore_errors=True)  # it may hold paths of a vanished build venv
        tree.mkdir(parents=True)
        built = self._build(tree)
        _replace(built, target)
        if cache:
            cache.keep(key, built.read_bytes())
        shutil.rmtree(tree, ignore_errors=True)

    def _build(self, tree: Path) -> Path:
        self._run("cmake", "-S", str(ROOT), "-B", str(tree), *self._configure_args())
        self._run("cmake", "--build", str(tree), "--target", "_C", *self._parallel_args())
        return tree / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

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


def _check_needs() -> None:
    """Ends with one line if what a build without isolation needs is not installed."""
    lacking = ["pybind11"] if importlib.util.find_spec("pybind11") is None else []
    lacking += ["cmake"] if shutil.which("cmake") is None else []
    if lacking:
        sys.exit(
            f"zsseg: expected {' and '.join(lacking)} to be installed, got nothing. Run: pip "
            "install 'setuptools>=61' 'pybind11>=2.13' 'cmake>=3.22' ninja, or leave out "
            "--no-build-isolation."
        )


# ---- extensions that were compiled before --------------------------------------------------------

# Environment that a compiler, a linker or CMake reads.
READ_BY_TOOLS = re.compile(
    r"ZSSEG_(CUDA.*|WERROR)|CMAKE_(?!.*_COMPILER_LAUNCHER$|BUILD_PARALLEL_LEVEL$).*|CXX|CXXFLAGS"
    r"|CPPFLAGS|LDFLAGS|CUDA.*|NVCC.*|CPATH|CPLUS_INCLUDE_PATH|LIBRARY_PATH|COMPILER_PATH|GCC_.*"
    r"|SOURCE_DATE_EPOCH|_PYTHON_.*|[A-Za-z0-9]+_(ROOT|DIR)"
)


GPU_NODE = re.compile(r"nvidia\d+|nvgpu").fullmatch


def source_key(debug: bool) -> str:
    """A hash of all that decides what is compiled: source, tools, Python, settings, GPUs."""
    state = hashlib.sha256()
    for path in [*sorted((ROOT / "csrc").rglob("*")), ROOT / "CMakeLists.txt", ROOT / "setup.py"]:
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            state.update(f"{path.relative_to(ROOT)} {content}\n".encode())
    read = {name: text for name, text in os.environ.items() if READ_BY_TOOLS.fullmatch(name)}
    facts = [sorted(read.items()), debug, sys.version, sysconfig.get_platform()]
    facts += [sysconfig.get_config_var("EXT_SUFFIX")]
    facts += [sysconfig.get_path("include"), platform.libc_ver(), *_tools()]
    state.update(repr(facts).encode())
    return state.hexdigest()


def _tools() -> list[str]:
    """Versions of every compiler that CMake could choose, and the GPUs that AUTO builds for."""
    import pybind11

    words = [pybind11.__version__, _output("cmake", "--version")]
    compilers = [os.environ.get("CXX", ""), "c++", "CC", "g++", "clang++", "ld", "as"]
    cuda = [os.environ.get(name, "") for name in ("CUDACXX", "CUDAHOSTCXX")]
    homes = [os.environ.get("CUDA_PATH", ""), os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    cuda += ["nvcc", *(f"{home}/bin/nvcc" for home in homes)]
    commands = [shlex.split(name) for name in (*compilers, *cuda) if name]
    words += [f"{_file(command[0])} {_output(*command, '--version')}" for command in commands]
    # Compilers and toolchain files may be named in further arguments.
    words += map(_file, re.split(r"[\s=;\"']+", os.environ.get("CMAKE_ARGS", "")))
    words.append(_output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"))
    words += [str(path) for path in sorted(Path("/dev").glob("nv[ig]*")) if GPU_NODE(path.name)]
    board = Path("/proc/device-tree/compatible")
    return [*words, repr(board.read_bytes() if board.exists() else b"")]


def _file(name: str) -> str:
    """The program or file that a name stands for, with its size and time."""
    found = shutil.which(name) or name
    if not name or not Path(found).is_file():
        return ""
    real = Path(found).resolve()
    return f"{real} {real.stat().st_size} {real.stat().st_mtime_ns}"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout
    return ""


class BuildCache:
    """Finished extensions, each in a file named KEY-SHA256; only whole and own files are used."""

    KEPT = 8

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_user(cls) -> "BuildCache | None":
        """That in the user's cache folder; None if it is switched off or somebody else's."""
        if os.environ.get("ZSSEG_BUILD_CACHE") == "0":
            return None
        with suppress(OSError, RuntimeError):  # no home, or not writable: then without
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(os.environ.get("ZSSEG_HOME") or Path(home, "zsseg_rt")) / "extensions"
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = folder.stat()
            if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
                return cls(folder)
        return None

    def read(self, key: str) -> bytes | None:
        """The extension of a key, or None; a damaged one is removed."""
        for path in self.folder.glob(f"{key}-*"):
            with suppress(OSError):
                data = path.read_bytes()
                if path.name == _entry(key, data):
                    os.utime(path)
                    return data
                path.unlink()
        return None

    def keep(self, key: str, data: bytes) -> None:
        """Adds an extension, and removes those that were not used for longest."""
        with suppress(OSError):
            _write(data, self.folder / _entry(key, data))
            entries = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in entries[: -self.KEPT]:
                path.unlink()


def _entry(key: str, data: bytes) -> str:
    return f"{key}-{hashlib.sha256(data).hexdigest()}"


def _replace(source: Path, target: Path) -> None:
    _write(source.read_bytes(), target)


def _write(data: bytes, target: Path) -> None:
    """Writes under a temporary name first: a running interpreter may have the old file mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o777 & ~mask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


if int(setuptools.__version__.partition(".")[0]) < 61 and "build_ext" not in sys.argv:
    sys.exit(  # it would install a package without a name
        f"zsseg: expected setuptools 61 or newer, got {setuptools.__version__}. Run: pip install "
        "'setuptools>=61', or leave out --no-build-isolation."
    )
setup(
    ext_modules=[Extension("zsseg_rt._C", sources=[])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
