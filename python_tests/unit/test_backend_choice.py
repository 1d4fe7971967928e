"""Which graph and precision every backend takes: a table that needs neither GPU nor files."""

import re
from types import SimpleNamespace

import pytest

from support.errors import refused
from zsseg_rt.backends import _openvino, _tensorrt, _torch
from zsseg_rt.backends.base import Choice
from zsseg_rt.config import PRECISIONS
from zsseg_rt.errors import DeviceError, PrecisionNotApplied

ANY = ("float16", "bfloat16", "float32")
CPUS = {  # what OpenVINO reports of a CPU, and the precision its plugin takes by itself
    "plain": (["FP32", "INT8"], "f32"),
    "amx": (["BF16", "FP32", "INT8"], "bf16"),
    "emulated": (["BF16", "FP32"], "f32"),
    "arm": (["FP32", "FP16"], "f16"),
}
BACKENDS = {
    "openvino": _openvino.BACKEND,
    "torch": _torch.BACKEND,
    "tensorrt": _tensorrt.BACKEND,
}
BOTH, FULL, HALF = ("float32", "float16"), ("float32",), ("float16",)

# (backend, machine, what the bundle holds, what is asked) -> (graph, precision), None if refused
TABLE = [
    ("openvino", "plain", BOTH, "auto", ("float32", "float32")),
    ("openvino", "plain", HALF, "auto", ("float16", "float32")),
    ("openvino", "plain", BOTH, "bfloat16", None),
    ("openvino", "plain", BOTH, "float16", None),
    ("openvino", "plain", BOTH, "int8", None),
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
            monkeypatch.setattr(_openvino, "process_core", lambda: core(*CPUS[machine]))
        properties = {"compute_capability": machine}
        native = SimpleNamespace(cuda_device_properties=lambda index: properties)
        monkeypatch.setattr(_torch, "core", native)
        device = "cpu" if machine == "cpu" or machine in CPUS else "cuda:0"
        return BACKENDS[backend].choose(held, asked, device=device, allowed=allowed)

    return on


def core(capabilities, hint):
    properties = {
        "OPTIMIZATION_CAPABILITIES": capabilities,
        "INFERENCE_PRECISION_HINT": SimpleNamespace(get_type_name=lambda: hint),
    }
    return SimpleNamespace(get_property=lambda device, name: properties[name])


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
        for name in (proposed[1], *listed[1].split(", ")):
            choose(backend, machine, held, name, allowed)


def test_openvino_serves_the_cpu_alone(choose):
    with refused(DeviceError, "device"):
        choose("openvino", "8.7", BOTH, "auto")


def test_a_bundle_without_a_graph_that_fits_is_told_so(choose):
    with refused(PrecisionNotApplied, "precision"):
        choose("openvino", "plain", ("int8",), "auto")
