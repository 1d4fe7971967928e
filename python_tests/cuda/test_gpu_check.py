"""tools/gpu_check.sh without a GPU: stand-ins for its tools, the emulated GPU as the device."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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

NO_TORCH = ("torch", "pytest", "cv2", "tensorrt_rtx")
BEFORE = {"driver": "580.1", "power_w": 70.0}
SWEEPS = {"rows": [{"name": "wait=sleep", "cpu_ms": 0.2}]}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this project whose extension's CUDA is emulated, and whose build does nothing."""
    if not EMULATED:
        pytest.skip("the emulated GPU's extension is not built; tools/test.sh builds it")
    root = tmp_path_factory.mktemp("checkout")
    leave_out = shutil.ignore_patterns("__pycache__", "_C*.so", "*-20*.json")  # records
    for folder in ("zsseg_rt", "tools", "benchmarks", "python_tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=leave_out)
    shutil.copy2(ROOT / "pyproject.toml", root)
    shutil.copy2(EMULATED[-1], root / "zsseg_rt")
    (root / "setup.py").write_text(SETUP)
    return root


def write_program(folder, name, text):
    """A program for the shell."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(0o755)
    return file


class Machine:
    """One with a GPU, of stand-ins: its tools on the path, its packages but the hidden ones."""

    def __init__(self, checkout, folder, tools=tuple(TOOLS), hidden=("tensorrt_rtx",)):
        self.out, self.work = folder / "out", folder / "work"
        self._script = checkout / "tools" / "gpu_check.sh"
        for name in tools:
            write_program(folder / "bin", name, TOOLS[name])
        packages = folder / "packages"
        (packages / "tensorrt").mkdir(parents=True)
        hiding = f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))"
        (packages / "sitecustomize.py").write_text(hiding)
        module = MODULE.format(tests=str(checkout / "python_tests"))
        (packages / "tensorrt" / "__init__.py").write_text(module)
        self.environment = {
            **os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(packages), "ZSSEG_PYTHON": sys.executable, "ZSSEG_EXTENSION": "",
            "CUDA_HOME": str(folder / "none"),
        }  # fmt: skip

    def check(self, *options, **environment):
        """Run a check to its end."""
        command = ["bash", self._script, "--out", self.out, "--work", self.work, *options]
        return subprocess.run(
            [str(word) for word in command], env=self.environment | environment, text=True,
            capture_output=True, timeout=480, check=False,
        )  # fmt: skip


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """The check's own modules, which import each other by their bare names."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "gpu_check"))


def read_record(machine):
    file = max(machine.out.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    record = json.loads(file.read_text())
    return file, record, {step["name"]: step for step in record["steps"]}


@pytest.mark.nightly
def test_every_step_runs_and_the_record_holds_what_it_found(checkout, tmp_path):
    """TensorRT and the profilers are stand-ins, torch sees no GPU; a race is found."""
    machine = Machine(checkout, tmp_path)
    program = write_program(tmp_path, "program", "exit 0")
    done = machine.check("--quick", "--program", program)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "gpu_check: failed: racecheck\n" in done.stderr
    file, record, steps = read_record(machine)
    assert file.name == f"stand-in-{record['date'][:10]}.json"
    torch_steps = ["frames torch", "stream torch", "engine tests", "frame times torch"]
    torch_steps += [f"one frame in torch's profiler, {name}" for name in ("tensorrt", "torch")]
    torch_steps += ["one frame in nsys, torch", "sweeps torch"]
    assert (record["passed"], record["failed"]) == (False, ["racecheck"])
    assert record["missing"] == torch_steps
    passed = [name for name, step in steps.items() if step["state"] == "passed"]
    assert len(passed) == len(steps) - len(torch_steps) - 1 == 16
    assert steps["racecheck"]["output"] == ["a hazard"]
    assert "sees no GPU" in steps["engine tests"]["reason"]
    assert steps["kernel tests"]["tests"]["tests"] > 20
    assert record["driver"] == "999.10"
    assert record["before"]["power_w"] == 99.5
    assert record["before"]["memory_mhz"] is None  # what nvidia-smi does not tell
    assert (record["device"], record["compute_capability"]) == ("emulated on the CPU", "7.5")
    assert str(checkout) not in file.read_text()
    results = record["results"]
    frames = results["frames tensorrt"]["rows"]
    assert [row["precision"] for row in frames] == ["float16", "float32"]
    for row in frames:
        assert row["proved_plans"] == 2
        assert row["fused_attention"] == {"image_encoder": 1, "decoder": 1}
        assert row["unequal"] == {"replayed": 0.0, "two lanes": 0.0, "from the device": 0.0}
    times = results["frame times tensorrt"]
    assert set(times["opened"]) == {"float16", "float32"}
    assert times["cases"][0]["candidates"]["engine float16, host to host"]["p50_ms"] > 0
    assert results["one frame in nsys, tensorrt"]["cuda_gpu_kern_sum"][1]["Name"] == "overlay<a, b>"
    assert results["kernels in ncu"]["kernels"][0]["registers"] == "40"
    rows = {row["name"]: row for row in results["sweeps tensorrt"]["rows"]}
    assert rows["wait=sleep"]["p50_ms"] > 0
    assert rows["two lanes in two threads"]["two_frames_per_second"] > 0


def test_tensorrt_alone_is_enough_for_frames(checkout, tmp_path):
    """A bare Jetson: no torch, pytest, OpenCV or profiler. Then a plan that is wrong."""
    machine = Machine(checkout, tmp_path, ["nvidia-smi"], NO_TORCH)
    crash = write_program(tmp_path, "crash", "kill -SEGV $$")
    options = ("--no-build", "--quick", "--program", crash, "--only", "engine")
    done = machine.check(*options)
    assert done.returncode == 3, done.stdout + done.stderr
    _, record, steps = read_record(machine)
    assert steps["frames tensorrt"]["state"] == "passed"
    assert record["missing"] == ["frames torch", "stream tensorrt", "stream torch", "engine tests"]
    for plan in (machine.work / "home" / "engines").glob("*.plan"):
        plan.unlink()
    groups = ("kernels", "kernel-times", "profiles", "sanitizers")
    rest = [word for group in groups for word in ("--only", group)]
    done = machine.check(*options, *rest, STAND_IN_WRONG="image_encoder")
    assert done.returncode == 1, done.stdout + done.stderr
    _, second, steps = read_record(machine)
    assert second["failed"] == ["every kernel", "frames tensorrt"]  # a crash ends no other step
    reason = second["results"]["frames tensorrt"]["rows"][0]["reason"]
    assert "expected the golden sample within" in reason
    assert "image_encoder.float16-" in reason
    why = {name: step.get("reason") for name, step in steps.items()}
    assert why["every kernel"] == "exit status -11"
    assert "pytest" in why["kernel tests"]
    assert why["kernels in ncu"] == "no ncu; it is in Nsight Compute"
    assert why["memcheck"] == "no compute-sanitizer; it is in the CUDA toolkit"
    (record,) = (machine.work / "home" / "engines").glob("image_encoder.float16-*.golden")
    assert "patch_embeds" in json.loads(record.read_text())["about"]["problem"]


def test_without_a_gpu_nothing_is_checked(checkout, tmp_path):
    if Path("/etc/nv_tegra_release").exists():
        pytest.skip("this is a Jetson, where nvidia-smi is not asked")
    machine = Machine(checkout, tmp_path, [])
    write_program(tmp_path / "bin", "nvidia-smi", "exit 9")
    done = machine.check()
    assert done.returncode == 4
    assert "expected an NVIDIA GPU and its driver, got none" in done.stderr
    assert not machine.out.exists()


def test_a_step_that_hangs_ends_with_its_children(tmp_path):
    """Also those that it left behind; a limit of its own is a failure, one of the whole is not."""
    import gpu_processes

    alive = tmp_path / "alive"
    os.mkfifo(alive)
    # The child holds the pipe open for as long as it lives; the reader then sees its end.
    script = f"sleep 600 > {alive} & echo begun; sleep 600"
    step = gpu_processes.Step(name="hangs", command=["bash", "-c", script], limit=2.0)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    ticks = []
    outcome = gpu_processes.run_step(step, 600.0, lambda: ticks.append(1))
    assert (outcome["state"], outcome["reason"]) == ("failed", "took longer than 2 s")
    assert outcome["output"] == ["begun"]
    assert ticks
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""
    os.close(reader)
    cut = gpu_processes.run_step(gpu_processes.Step(name="cut", command=["sleep", "600"]), 2.0)
    assert (cut["state"], cut["reason"]) == ("missing", "only 2 s were left")
    late = gpu_processes.run_step(step, 0.0)
    assert late == {"name": "hangs", "state": "missing", "reason": "no time was left"}
    quick = gpu_processes.Step(name="quick", command=["sh", "-c", "echo not here; exit 3"])
    absent = gpu_processes.run_step(quick, 600.0)
    assert (absent["state"], absent["reason"]) == ("missing", "not here")


ABSENT = "hypothesis open_clip typer rich cv2 onnx openvino torchvision PIL"


def test_gpu_tests_need_no_more_than_numpy_torch_and_pytest():
    """Each file is collected where all else is absent."""
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


def test_expected_kernels_are_cases_of_the_benchmark():
    """A name that no case has would never be off."""
    from tools.benchmark_kernels import CASES
    from tools.kernels.benches import CpuBench

    rows = json.loads((ROOT / "tools" / "gpu_check" / "expected.json").read_text())["figures"]
    named = {row["name"].removesuffix(": us") for row in rows if row["name"].endswith(": us")}
    wanted = {name.split()[0] for name in named}
    bench = CpuBench(1)
    names = {
        f"{case.op} {case.sizes}"
        for op, cases in CASES.items()
        if op in wanted
        for case in cases(bench, quick=False)
    }
    assert named <= names
    for row in rows:
        assert row.keys() <= {"name", "gpu", "at_least", "at_most", "source"}
        assert row["source"].startswith(("counted, ", "estimated, ", "measured, "))


def test_a_record_is_on_disk_after_every_step_and_continued(tmp_path):
    from gpu_record import COPY, Record

    work = tmp_path / "work"
    (work / "results").mkdir(parents=True)
    record = Record("NVIDIA H100", BEFORE, tmp_path / "out", work)
    record.add({"name": "build", "state": "passed"})
    (work / "results" / "sweeps torch.json").write_text(json.dumps(SWEEPS))
    (work / "results" / "kernel times.json").write_text('{"half a')
    record.add({"name": "kernel tests", "state": "missing", "reason": "no time was left"})
    kept = json.loads(record.file.read_text())
    assert (kept["passed"], kept["missing"]) == (False, ["kernel tests"])
    assert kept["results"] == {"sweeps torch": SWEEPS}
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
