"""Launches are captured and replayed, with a torch whose CUDA is made up."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.kernels.benches import LAUNCHES, CaptureRefusedError
from zsseg_rt import ops
from zsseg_rt.errors import BackendError
from zsseg_rt.profiling.worker import load_file

ROOT = Path(__file__).resolve().parents[2]


class FakeCuda:
    def __init__(self):
        self.capturing, self.opened, self.replays = None, [], 0

    def ExternalStream(self, handle):  # noqa: N802 - torch's name
        return f"stream {handle}"

    def CUDAGraph(self):  # noqa: N802 - torch's name
        return SimpleNamespace(replay=self._replay)

    def _replay(self):
        assert self.capturing is None
        self.replays += 1

    @contextlib.contextmanager
    def graph(self, captured, *, stream, capture_error_mode):
        self.opened.append(capture_error_mode)
        self.capturing = captured
        try:
            yield
        finally:
            self.capturing = None

    def synchronize(self):
        assert self.capturing is None


@pytest.fixture
def tool(monkeypatch):
    """The script, imported as a file: its folder would hide Python's own module profile."""
    monkeypatch.setitem(sys.modules, "captured_kernels", None)  # forgotten when the test ends
    threads = ops.get_num_threads()
    yield load_file("captured_kernels", ROOT / "tools" / "benchmark_kernels.py")
    ops.set_num_threads(threads)


@pytest.fixture
def fake_gpu(tool, monkeypatch):
    """The tool on a GPU that is the CPU, with a torch that captures everything but crops."""
    real = pytest.importorskip("torch")

    class TorchOnFakeGpu:
        cuda = FakeCuda()

        def __getattr__(self, name):
            return getattr(real, name)

        def zeros(self, *shape, device):
            assert device == "cuda"
            return real.zeros(*shape)

    class FakeBench(tool.CpuBench):
        name, sets, cuda = "cuda", 3, TorchOnFakeGpu.cuda

        def __init__(self, threads):
            super().__init__(threads)
            self.torch, self.cv2 = TorchOnFakeGpu(), None

    crop = tool.ops.crop_regions

    def waiting_crop(*args, **kwargs):
        if TorchOnFakeGpu.cuda.capturing is not None:
            raise BackendError("cudaMemcpyAsync: operation not permitted when stream is capturing")
        return crop(*args, **kwargs)

    monkeypatch.setattr(tool.ops, "crop_regions", waiting_crop)
    monkeypatch.setattr(tool.ops, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(tool.ops, "cuda_device_properties", lambda _: {"name": "none"})
    monkeypatch.setattr(tool, "CudaBench", FakeBench)
    return FakeBench


def report_of(tool, tmp_path, *operations):
    file = tmp_path / "report.json"
    chosen = [word for name in operations for word in ("--op", name)]
    assert tool.main(["--quick", "--device", "cuda", *chosen, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_a_captured_kernel_stands_beside_its_floor(tool, fake_gpu, tmp_path, capsys):
    report = report_of(tool, tmp_path, "patch_text_similarity", "overlay", "crop_regions")
    floor = report["floor"]
    similar, *in_frames, overlaid, cropped = report["results"]
    assert [set(result["captured"]["median_ms"]) for result in in_frames] == [{"zsseg_rt"}] * 2
    for result in (similar, overlaid):
        captured = result["captured"]
        assert set(captured["median_ms"]) == {"zsseg_rt", "torch"}
        assert (captured["launches"], captured["sets"]) == (LAUNCHES, 3)
        assert captured["not_captured"] == {}
        expected = captured["floor_ms"] / captured["median_ms"]["zsseg_rt"]
        assert captured["share_of_floor"] == pytest.approx(expected)
    moved = 2 * 90 * 160 * 3 + 90 * 160 + 3 * 20  # of the overlay: frame, result, labels, palette
    floor_ms = moved / floor["copy_gigabytes_per_second"] / 1e6
    assert overlaid["captured"]["floor_ms"] == pytest.approx(floor_ms)
    computed_ms = 2 * 16 * 5 * 32 / floor["product_teraflops"] / 1e9
    assert similar["captured"]["floor_ms"] >= computed_ms * 0.999
    assert "not permitted" in cropped["captured"]["not_captured"]["zsseg_rt"]
    assert "share_of_floor" not in cropped["captured"]
    assert cropped["median_ms"]["zsseg_rt"] > 0.0
    cuda = fake_gpu.cuda
    assert set(cuda.opened) == {"thread_local"}
    assert cuda.replays > len(cuda.opened) > 3
    printed = capsys.readouterr().out
    assert "of its speed; 3 sets of buffers" in printed
    assert "zsseg_rt: not captured, only timed call by call" in printed


def test_without_captures_the_output_says_what_times_hold(
    tool, fake_gpu, tmp_path, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise CaptureRefusedError("not on this driver")

    monkeypatch.setattr(tool, "capture_launches", refuse)
    report = report_of(tool, tmp_path, "overlay")
    assert report["floor"] is None
    assert report["results"][0]["captured"] is None
    assert "no captures: a plain copy or product was refused: not on this" in (
        capsys.readouterr().out
    )
