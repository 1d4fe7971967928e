"""tools/gpu_check.sh without a GPU: a stand-in nvidia-smi, the emulated GPU as the device."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATED = sorted(
    ROOT.glob("build/*/cpp_tests/cuda_emulation/_C*.so"), key=lambda file: file.stat().st_mtime
)
NVIDIA_SMI = """#!/usr/bin/env bash
case "$*" in
  -L) echo "GPU 0: Stand-in (UUID: GPU-0)" ;;
  *--query-gpu=compute_cap*) echo "8.7" ;;
  *--query-gpu=driver_version,*) echo "999.10, 1200, [N/A], 1980, 3201, 99.50, 700.00, 41, 512" ;;
  *) exit 2 ;;
esac
"""
# Wants a program as the tool does, and fails as the tool does where it finds something.
SANITIZER = """#!/usr/bin/env bash
[[ "$1 $3 $4" == "--tool --error-exitcode 9" ]] || exit 2
[ "$2" != racecheck ] || { echo "a hazard"; exit 9; }
[ -x "$5" ]
"""


def write_program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this project whose extension's CUDA is emulated."""
    if not EMULATED:
        pytest.skip("the emulated GPU's extension is not built; tools/test.sh builds it")
    root = tmp_path_factory.mktemp("checkout")
    leave_out = shutil.ignore_patterns("__pycache__", "_C*.so", "*-20*.json")  # records
    for folder in ("zsseg_rt", "tools", "benchmarks", "python_tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=leave_out)
    shutil.copy2(ROOT / "pyproject.toml", root)
    shutil.copy2(EMULATED[-1], root / "zsseg_rt")
    return root


def check(checkout: Path, *options: object, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"ZSSEG_PYTHON": sys.executable, "ZSSEG_EXTENSION": ""}
    script = checkout / "tools" / "gpu_check.sh"
    return subprocess.run(
        ["bash", str(script), *map(str, options)],
        env=environment, capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip


def test_a_short_run_writes_the_record(checkout, tmp_path):
    """What ran, what failed and what could not run, with the clocks; nothing counts as passed."""
    write_program(tmp_path / "bin", "nvidia-smi", NVIDIA_SMI)
    write_program(tmp_path / "bin", "compute-sanitizer", SANITIZER)
    program = EMULATED[-1].parent / "zsseg_cuda_tests_emulated"
    options = ("--no-build", "--quick", "--out", tmp_path / "out", "--program", program)
    done = check(checkout, *options, path=tmp_path / "bin")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "gpu_check: failed: racecheck" in done.stderr
    (file,) = (tmp_path / "out").iterdir()
    record = json.loads(file.read_text())
    assert file.name == f"emulated-on-the-cpu-{record['date'][:10]}.json"
    states = {step["name"]: step["state"] for step in record["steps"]}
    assert states == {
        "every kernel": "passed",
        "memcheck": "passed",
        "racecheck": "failed",
        "initcheck": "passed",
        "synccheck": "passed",
        "kernel tests": "passed",
        "engine tests": "missing",
        "kernels benchmark": "passed",
        "engine benchmark": "missing",
    }
    assert (record["passed"], record["failed"]) == (False, ["racecheck"])
    assert record["missing"] == ["engine tests", "engine benchmark"]
    steps = {step["name"]: step for step in record["steps"]}
    assert steps["racecheck"]["output"] == ["a hazard"]
    assert "sees no GPU" in steps["engine tests"]["reason"]
    assert steps["kernel tests"]["tests"]["tests"] > 20
    assert record["driver"] == "999.10"
    assert record["before"]["power_w"] == 99.5
    assert record["before"]["memory_mhz"] is None  # what nvidia-smi does not tell
    assert record["compute_capability"] == "7.5"
    assert record["benchmarks"]["kernels"]["device"] == "cuda"
    assert record["benchmarks"]["engine"] is None
    assert str(checkout) not in file.read_text()


def test_without_a_gpu_nothing_is_checked(checkout, tmp_path):
    if Path("/etc/nv_tegra_release").exists():
        pytest.skip("this is a Jetson, where nvidia-smi is not asked")
    write_program(tmp_path / "bin", "nvidia-smi", "#!/bin/sh\nexit 9\n")
    done = check(checkout, "--out", tmp_path / "out", path=tmp_path / "bin")
    assert done.returncode == 4
    assert "expected an NVIDIA GPU and its driver, got none" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_extension_that_sees_no_gpu_is_said(checkout, tmp_path):
    """The stand-in says that there is a GPU; the checkout's extension has no CUDA."""
    broken = tmp_path / "checkout"
    for folder in ("tools", "zsseg_rt"):
        shutil.copytree(checkout / folder, broken / folder)
    next((broken / "zsseg_rt").glob("_C*.so")).write_bytes(b"not a library")
    write_program(tmp_path / "bin", "nvidia-smi", NVIDIA_SMI)
    done = check(broken, "--no-build", "--out", tmp_path / "out", path=tmp_path / "bin")
    assert done.returncode == 4
    assert "expected an extension that sees this GPU, got:" in done.stderr


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "gpu_check"))
    import gpu_processes

    return gpu_processes


def test_a_step_that_hangs_ends_with_its_children(processes, tmp_path, monkeypatch):
    """Also those that it left behind; its limit is what is left of the whole."""
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    # The child holds the pipe open for as long as it lives; the reader then sees its end.
    script = f"sleep 600 > {alive} & echo begun; sleep 600"
    step = processes.Step(name="hangs", command=["bash", "-c", script], limit=600.0)
    monkeypatch.setattr(processes, "TOTAL_SECONDS", 3.0)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    outcome = processes.run_step(step, processes.time.monotonic())
    assert outcome["state"] == "failed"
    assert outcome["reason"].startswith("took longer than")
    assert outcome["output"] == ["begun"]
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""
    os.close(reader)
    late = processes.run_step(step, processes.time.monotonic() - 600.0)
    assert late == {"name": "hangs", "state": "missing", "reason": "no time was left"}


def test_only_files_with_gpu_tests_are_collected(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "gpu_check"))
    from gpu_steps import gpu_test_files

    names = {path.name for path in gpu_test_files()}
    assert {"test_gpu_engine.py", "test_ops_overlay.py", "test_array_boundary.py"} <= names
    assert not any("training" in name or "stream" in name or "server" in name for name in names)


ABSENT = "hypothesis open_clip typer rich cv2 onnx onnxscript openvino torchvision PIL"


def test_gpu_tests_need_no_more_than_numpy_torch_and_pytest(monkeypatch):
    """Each file is collected where all else is absent."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "gpu_check"))
    from gpu_steps import gpu_test_files

    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT.split()!r}))\n"
    code += "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["--collect-only", "-q", "-m", "needs_cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options, *map(str, gpu_test_files())],
        cwd=ROOT, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "test_gpu_engine.py" in done.stdout
