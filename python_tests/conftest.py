"""Fixtures every test file shares.

``ZSSEG_EXTENSION=PATH`` names another build of ``zsseg_rt._C`` to test: the one whose CUDA is
emulated (cpp_tests/cuda_emulation). ``ZSSEG_TEST_CPU=NAME`` hides what this CPU has beyond that of
``support.cpus``.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.choice import pytest_addoption, pytest_collection_modifyitems  # noqa: F401
from support.extension import use_extension

# GStreamer runs in child processes alone, of the tests that are about it.
os.environ.setdefault("ZSSEG_RTSP_LIBRARY", "pyav")

if os.environ.get("ZSSEG_EXTENSION"):
    use_extension(os.environ["ZSSEG_EXTENSION"])

from support import cpus  # puts the stand-in of ZSSEG_TEST_CPU in place
from zsseg_rt import ops


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave out of garbage collection what was imported: looking through it takes long."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Undo what benchmarks and engines of backend "torch" do to the whole process.

    Torch's threads of two processes wait for each other on two cores, at full speed.
    """
    torch = sys.modules.get("torch")
    threads = os.environ.get("OMP_NUM_THREADS")
    if torch is not None and threads and torch.get_num_threads() != int(threads):
        torch.set_num_threads(int(threads))


class CpuDevice:
    """Where an operation's test puts its arrays and looks for the result."""

    name = "cpu"
    stream = 0

    def place(self, array):
        """A copy of a NumPy array on this device."""
        return np.array(array, order="C")

    def holds(self, array) -> bool:
        return isinstance(array, np.ndarray)

    def fetch(self, array) -> np.ndarray:
        return np.asarray(array)

    def poisoned(self, shape, dtype):
        """An array to write into, full of NaN (0xCD bytes for integers)."""
        if np.dtype(dtype).kind == "f":
            return self.place(np.full(shape, np.nan, dtype))
        data = np.full((*np.atleast_1d(shape), np.dtype(dtype).itemsize), 0xCD, np.uint8)
        return self.place(data.view(dtype)[..., 0])


class CudaDevice(CpuDevice):
    """As above on the first GPU; everything is enqueued on a stream of the test's own."""

    name = "cuda:0"

    def __init__(self):
        self._stream = ops.Stream(0)
        self.stream = self._stream.handle

    def place(self, array):
        return ops.DeviceArray.from_numpy(np.array(array, order="C"), 0, self.stream)

    def holds(self, array) -> bool:
        return isinstance(array, ops.DeviceArray) and array.device == self.name

    def fetch(self, array) -> np.ndarray:
        return array.numpy(self.stream)


def require_cuda() -> None:
    """Skip without a usable GPU; fail where ZSSEG_REQUIRE_CUDA=1 says there must be one."""
    if ops.cuda_device_count() > 0:
        return
    if os.environ.get("ZSSEG_REQUIRE_CUDA") == "1":
        pytest.fail("ZSSEG_REQUIRE_CUDA=1, but no CUDA device is usable")
    pytest.skip("no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)])
def device(request) -> CpuDevice:
    """The device a contract test runs on; assert ``device.holds(result)`` in every test."""
    if request.param == "cpu":
        return CpuDevice()
    require_cuda()
    return CudaDevice()


@pytest.fixture(params=ops.available_cpu_isas())
def cpu_isa(request) -> Iterator[str]:
    """Runs the test once for every instruction set this CPU has kernels for."""
    before = ops.cpu_isa()
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)


@pytest.fixture
def vnni(monkeypatch) -> None:
    """A CPU that OpenVINO may use INT8 on, for what is refused before anything computes in it."""
    cpus.stand_in(monkeypatch, "vnni", computes=True)


@pytest.fixture(params=[1, 3])
def num_threads(request) -> Iterator[int]:
    """Runs the test on the caller alone and on several threads."""
    before = ops.get_num_threads()
    ops.set_num_threads(request.param)
    yield request.param
    ops.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference data beside the project; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("reference data not found: expected the folder 'shared' beside the project")
    return folder


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory) -> str:
    """A tiny CLIP with the standard vocabulary; its activation is quick_gelu."""
    from support.small_runs import save_clip

    return str(save_clip(tmp_path_factory.mktemp("clip") / "tiny.safetensors"))


@pytest.fixture(scope="session")
def colour_bundle(tmp_path_factory) -> Path:
    """A dense bundle whose text bank is colour words; see support.colour_words."""
    from support.colour_words import export_colour_bundle

    return export_colour_bundle(tmp_path_factory.mktemp("bundles") / "colours.zsseg")


@pytest.fixture(scope="session")
def zegclip_model():
    """A tiny random ZegCLIP whose text tower knows the whole CLIP vocabulary."""
    from support import tiny

    return tiny.zegclip_model(tiny.TinySizes(text_vocab=49408, text_length=77))


@pytest.fixture(scope="session")
def zegclip_bundle(zegclip_model, tmp_path_factory) -> Path:
    """That model as a bundle; its classes are "name 0" to "name 6"."""
    from zsseg_rt.export import export_bundle

    return export_bundle(
        zegclip_model,
        tmp_path_factory.mktemp("bundles") / "tiny.zsseg",
        class_names=[f"name {index}" for index in range(7)],
    )


@pytest.fixture
def rtsp_cameras() -> Iterator[Callable[..., Any]]:
    """Starts network cameras (``support.gstreamer.RtspCamera``) that end with the test."""
    from support.gstreamer import RtspCamera

    with contextlib.ExitStack() as running:
        yield lambda **options: running.enter_context(RtspCamera(**options))


@pytest.fixture
def rtx(monkeypatch) -> None:
    """Plans are TensorRT-RTX's, which builds them without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install '.[rtx]'")
    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")


@pytest.fixture(scope="module")
def without_gradients() -> Iterator[None]:
    """Runs a module's fixtures and tests in torch's no_grad."""
    import torch

    with torch.no_grad():
        yield
