"""The kernels compile with the CUDA 12.6 of JetPack 6, by NVRTC: its toolkit is not needed."""

import ctypes
import hashlib
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
        found = find_spec(f"nvidia.{package}")
    except ModuleNotFoundError:
        found = None
    return [Path(place) / folder for place in found.submodule_search_locations] if found else []


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


def test_what_cuda_12_does_not_know_is_found(nvrtc):
    text = "#include <cstdint>\n__global__ void kernel(std::int128_like* out) { *out = 1; }\n"
    code, log = nvrtc.compile(text, "wrong.cu", OPTIONS)
    assert code == b""
    assert "wrong.cu(2): error" in log
