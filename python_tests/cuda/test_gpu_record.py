"""What gpu_check.sh keeps of a run, compares with expectations, and brings along."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BEFORE = {"driver": "580.1", "power_w": 70.0}
FRAME = "512x512, 20 classes, engine on torch float16, host to host: p50_ms"
RESULTS = {
    "frame times torch": {
        "cases": [
            {
                "frame_hw": [512, 512],
                "classes": 20,
                "candidates": {
                    "engine float16, host to host": {"p50_ms": 2.0, "launches": "missing: CUPTI"},
                    "engine float16, device to device": {"p50_ms": 1.1, "launches": 119},
                    "torch float16, host to host": {"p50_ms": 5.0},
                },
            }
        ]
    },
    "sweeps torch": {"rows": [{"name": "wait=sleep", "cpu_ms": 0.2}]},
    "frames torch": {
        "rows": [
            {"bundle": "zegclip", "precision": "float16", "state": "passed",
             "fused_attention": {"image_encoder": 12, "decoder": None}}
        ]
    },
    "kernel times": {
        "results": [
            {"op": "overlay", "sizes": "1080x1920",
             "captured": {"median_ms": {"zsseg_rt": 0.0045}}},
            {"op": "mask_boxes", "sizes": "3 of 8x8", "failed": "differs"},
        ]
    },
    "one frame in torch's profiler, torch": {
        "kernels": [
            {"name": "gemm", "count": 100, "us": 90.0},
            {"name": "Memcpy HtoD", "count": 99, "us": 2.0},
        ]
    },
    "one frame in nsys, torch": {"cuda_gpu_kern_sum": [{"Instances": "350"}, {"Instances": "40"}]},
}  # fmt: skip


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "gpu_check"))


def test_measured_figures_stand_beside_expected_ones():
    from gpu_record import compare

    rows = {row["name"]: row for row in compare(RESULTS, "NVIDIA H100 80GB HBM3")}
    states = {name: row["state"] for name, row in rows.items()}
    assert states[FRAME] == "off"
    assert (rows[FRAME]["measured"], rows[FRAME]["at_most"]) == (2.0, 1.4)
    device = "512x512, 20 classes, engine on torch float16, device to device: "
    assert states[device + "p50_ms"] == "as expected"
    assert states[device + "launches"] == "as expected"
    assert states["sweeps torch, wait=sleep: cpu_ms"] == "as expected"
    assert states["overlay 1080x1920: us"] == "as expected"
    assert states["one frame in nsys, torch: kernels"] == "off"  # 390
    assert rows["one frame in torch's profiler, torch: kernels"]["measured"] == 100
    fused = "frames torch, zegclip float16: fused attention of "
    assert states[fused + "image_encoder"] == "as expected"
    assert states[fused + "decoder"] == "not measured"
    assert not {name for name in states if "AGX" in name}
    assert FRAME not in {row["name"] for row in compare(RESULTS, "Orin (nvgpu)")}


def test_expected_kernels_are_cases_of_the_benchmark():
    """A name that no case has would never be off."""
    sys.path.insert(0, str(ROOT))
    try:
        from tools.benchmark_kernels import CASES
        from tools.kernels.benches import CpuBench
    finally:
        sys.path.remove(str(ROOT))
    rows = json.loads((ROOT / "tools" / "gpu_check" / "expected.json").read_text())["figures"]
    named = {row["name"].removesuffix(": us") for row in rows if row["name"].endswith(": us")}
    wanted = {name.split()[0] for name in named}
    bench = CpuBench(1)
    found = {
        f"{case.op} {case.sizes}"
        for op, cases in CASES.items()
        if op in wanted
        for case in cases(bench, quick=False)
    }
    assert named <= found
    for row in rows:
        assert row.keys() <= {"name", "gpu", "at_least", "at_most", "source"}
        assert row["source"].startswith(("counted, ", "estimated, ", "measured, "))


def test_a_record_is_on_disk_after_every_step_and_continued(tmp_path):
    from gpu_record import COPY, Record

    work = tmp_path / "work"
    (work / "results").mkdir(parents=True)
    record = Record("NVIDIA H100", BEFORE, tmp_path / "out", work)
    record.add({"name": "build", "state": "passed"})
    (work / "results" / "sweeps torch.json").write_text(json.dumps(RESULTS["sweeps torch"]))
    (work / "results" / "kernel times.json").write_text('{"half a')
    record.add({"name": "kernel tests", "state": "missing", "reason": "no time was left"})
    kept = json.loads(record.file.read_text())
    assert (kept["passed"], kept["missing"]) == (False, ["kernel tests"])
    assert kept["results"] == {"sweeps torch": RESULTS["sweeps torch"]}
    assert kept == json.loads((work / COPY).read_text())
    shutil.rmtree(work / "results")
    later = Record("NVIDIA H100", BEFORE, tmp_path / "out", work, kept)
    assert later.file != record.file
    assert later.earlier_outcome("build") == {"name": "build", "state": "passed"}
    assert later.earlier_outcome("kernel tests") is None
    later.add({"name": "kernel tests", "state": "passed"})
    whole = json.loads(later.file.read_text())
    assert whole["passed"]
    assert whole["results"] == kept["results"]


def test_models_are_packed_and_unpacked_as_they_are(tmp_path):
    from gpu_models import MODEL, PACKED, STORED, find_model, pack

    (tmp_path / "work").mkdir()
    assert find_model(tmp_path, tmp_path / "work", quick=False) is None
    pack(STORED, tmp_path / PACKED)
    for _ in range(2):
        found = find_model(tmp_path, tmp_path / "work", quick=False)
        assert found == tmp_path / "work" / MODEL
    names = sorted(file.name for file in STORED.iterdir())
    assert sorted(file.name for file in found.iterdir()) == names
    assert all((found / name).read_bytes() == (STORED / name).read_bytes() for name in names)
    assert find_model(STORED.parent / "dense.zsseg", tmp_path, quick=False).name == "dense.zsseg"


def test_a_profiled_frame_is_told_by_kernel(monkeypatch):
    """The longest first; what ran on the host does not count."""
    import gpu_target

    span = lambda us: SimpleNamespace(elapsed_us=lambda: us)  # noqa: E731
    events = [("a", "gpu", 1.0), ("b", "gpu", 9.0), ("a", "gpu", 2.0), ("host", "cpu", 50.0)]
    told = [SimpleNamespace(name=n, device_type=d, time_range=span(us)) for n, d, us in events]
    calls = []

    class Profile:
        def __init__(self, activities):
            assert activities == ["cuda"]

        def __enter__(self):
            return SimpleNamespace(events=lambda: told)

        def __exit__(self, *_):
            assert calls == ["frame", "wait"]

    torch = ModuleType("torch")
    torch.cuda = SimpleNamespace(synchronize=lambda: calls.append("wait"))
    torch.autograd = SimpleNamespace(DeviceType=SimpleNamespace(CUDA="gpu"))
    profiler = ModuleType("torch.profiler")
    profiler.profile, profiler.ProfilerActivity = Profile, SimpleNamespace(CUDA="cuda")
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.profiler", profiler)
    rows = gpu_target.profile_call(lambda: calls.append("frame"))
    assert rows == [{"name": "b", "count": 1, "us": 9.0}, {"name": "a", "count": 2, "us": 3.0}]


def test_weights_of_the_model_are_signs_of_one_size(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import engine_model

    layer = torch.nn.Linear(40, 30)
    before = layer.weight.detach().clone()
    engine_model.with_signs(layer)
    (size,) = np.unique(np.abs(layer.weight.detach().numpy()))
    assert float(np.float16(size)) == size
    assert torch.equal(layer.weight > 0, before >= 0)
