"""Which graph and precision every backend takes: a table that needs neither GPU nor files."""

import re
from types import SimpleNamespace

import pytest

from support.cpus import CPUS, stand_in
from support.errors import refused
from zsseg_rt.backends import _openvino, _tensorrt, _torch
from zsseg_rt.backends._openvino import multiplies_bytes
from zsseg_rt.backends.base import Choice
from zsseg_rt.config import PRECISIONS
from zsseg_rt.errors import DeviceError, PrecisionNotApplied

ANY = ("float16", "bfloat16", "float32")
BACKENDS = {"openvino": _openvino.BACKEND, "torch": _torch.BACKEND, "tensorrt": _tensorrt.BACKEND}
BOTH, FULL, HALF = ("float32", "float16"), ("float32",), ("float16",)

# (backend, machine, what the bundle holds, what is asked) -> (graph, precision), None if refused
TABLE = [
    ("openvino", "avx2", BOTH, "auto", ("float32", "float32")),
    ("openvino", "avx2", HALF, "auto", ("float16", "float32")),
    ("openvino", "avx2", BOTH, "bfloat16", None),
    ("openvino", "avx2", BOTH, "float16", None),
    ("openvino", "avx2", BOTH, "int8", None),
    ("openvino", "avx2", (*BOTH, "int8"), "int8", None),
    ("openvino", "avx2", (*BOTH, "int8"), "auto", ("float32", "float32")),
    ("openvino", "vnni", (*BOTH, "int8"), "int8", ("int8", "int8")),
    ("openvino", "vnni", BOTH, "bfloat16", None),
    ("openvino", "vnni", FULL, "auto", ("float32", "float32")),
    ("openvino", "amx", (*BOTH, "int8"), "int8", ("int8", "int8")),
    ("openvino", "amx", BOTH, "auto", ("float32", "bfloat16")),
    ("openvino", "amx", BOTH, "float32", ("float32", "float32")),
    ("openvino", "amx", HALF, "bfloat16", None),
    ("openvino", "emulated", BOTH, "auto", ("float32", "float32")),
    ("openvino", "emulated", BOTH, "bfloat16", ("float32", "bfloat16")),
    ("openvino", "amx", (*BOTH, "bfloat16"), "bfloat16", ("float32", "bfloat16")),
    ("openvino", "amx", ("bfloat16",), "auto", ("bfloat16", "bfloat16")),
    ("openvino", "amx", ("bfloat16",), "float32", None),
    ("openvino", "arm", BOTH, "auto", ("float32", "float32")),
    ("openvino", "arm", BOTH, "float16", ("float16", "float16")),
    ("openvino", "arm", FULL, "float16", ("float32", "float16")),
    ("torch", "cpu", BOTH, "auto", ("float32", "float32")),
    ("torch", "cpu", HALF, "auto", ("float16", "float16")),
    ("torch", "cpu", BOTH, "bfloat16", ("float32", "bfloat16")),
    ("torch", "cpu", BOTH, "float16", ("float16", "float16")),
    ("torch", "cpu", HALF, "float32", None),
    ("torch", "8.7", BOTH, "auto", ("float16", "float16")),
    ("torch", "8.7", FULL, "auto", ("float32", "bfloat16")),
    ("torch", "7.5", FULL, "auto", ("float32", "float32")),
    ("torch", "7.5", BOTH, "auto", ("float16", "float16")),
    ("torch", "7.5", FULL, "bfloat16", ("float32", "bfloat16")),
    ("torch", "8.7", BOTH, "float32", ("float32", "float32")),
    ("torch", "8.7", BOTH, "fp8", None),
    ("tensorrt", "8.7", BOTH, "auto", ("float16", "float16")),
    ("tensorrt", "8.7", FULL, "auto", ("float32", "float32")),
    ("tensorrt", "8.7", (*BOTH, "bfloat16"), "bfloat16", ("bfloat16", "bfloat16")),
    ("tensorrt", "8.7", BOTH, "bfloat16", None),
    ("tensorrt", "8.7", (*BOTH, "int8"), "int8", ("int8", "int8")),
    ("tensorrt", "8.7", (*BOTH, "int8"), "auto", ("float16", "float16")),
    ("tensorrt", "8.7", FULL, "float16", None),
]


@pytest.fixture
def choose(monkeypatch):
    def on(backend, machine, held, asked, allowed=ANY):
        if machine in CPUS:
            stand_in(monkeypatch, machine)
        properties = {"compute_capability": machine}
        native = SimpleNamespace(cuda_device_properties=lambda index: properties)
        monkeypatch.setattr(_torch, "core", native)
        device = "cpu" if machine == "cpu" or machine in CPUS else "cuda:0"
        return BACKENDS[backend].choose(held, asked, device=device, allowed=allowed)

    return on


@pytest.mark.parametrize(("backend", "machine", "held", "asked", "given"), TABLE)
def test_choice(choose, backend, machine, held, asked, given):
    if given is None:
        with refused(PrecisionNotApplied, "precision"):
            choose(backend, machine, held, asked)
    else:
        variant, precision = given
        assert choose(backend, machine, held, asked) == Choice(variant=variant, precision=precision)


@pytest.mark.parametrize(
    ("backend", "machine"), [("openvino", "amx"), ("torch", "8.7"), ("tensorrt", "8.7")]
)
def test_graphs_that_decide_within_themselves_stay_in_float32(choose, backend, machine):
    chosen = choose(backend, machine, BOTH, "auto", allowed=("float32",))
    assert chosen == Choice(variant="float32", precision="float32")


MACHINES = [("openvino", name) for name in CPUS]
MACHINES += [("torch", "cpu"), ("torch", "7.5"), ("torch", "8.7"), ("tensorrt", "8.7")]


@pytest.mark.parametrize("allowed", [ANY, ("float32",)], ids=["any", "float32"])
@pytest.mark.parametrize("held", [BOTH, FULL, HALF, ("float16", "int8")], ids=", ".join)
@pytest.mark.parametrize("asked", PRECISIONS)
@pytest.mark.parametrize(("backend", "machine"), MACHINES)
def test_every_remedy_leads_somewhere(choose, backend, machine, held, asked, allowed):
    try:
        choose(backend, machine, held, asked, allowed)
    except PrecisionNotApplied as error:
        proposed = re.search(r"Use precision='(\w+)'", str(error))
        listed = re.search(r"for this bundle \(([^)]+)\)", str(error))
        for name in (proposed[1], *(listed[1].split(", ") if listed else ())):
            choose(backend, machine, held, name, allowed)


def test_openvino_serves_the_cpu_alone(choose):
    with refused(DeviceError, "device"):
        choose("openvino", "8.7", BOTH, "auto")


def test_a_bundle_without_a_graph_that_fits_is_told_so(choose):
    with refused(PrecisionNotApplied, "precision"):
        choose("openvino", "avx2", ("int8",), "auto")


@pytest.mark.parametrize(
    ("line", "is_fast"),
    [
        ("flags\t\t: fpu sse2 fma avx2", False),
        ("flags\t\t: fpu avx2 avx512f avx512bw", False),
        ("flags\t\t: fpu avx2 avx_vnni", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile amx_int8", True),
        ("Features\t: fp asimd asimddp", True),
        ("Features\t: fp asimd", False),
        ("model name\t: avx512_vnni", False),
        ("", False),
    ],
)
def test_int8_is_fast_where_the_cpu_multiplies_bytes(line, is_fast):
    assert multiplies_bytes(f"processor\t: 0\n{line}\n") is is_fast
