"""Stand-ins for CPUs: what OpenVINO's backend asks about the one it runs on.

``ZSSEG_TEST_CPU=avx2`` hides from a whole run what this CPU has beyond AVX2; with ``ZSSEG_CPU_ISA``
for our own kernels, it is the run of an older computer. (OpenVINO has no such limit of its own: it
may still use wider registers, in float32.)
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from zsseg_rt.backends import _openvino

# Name -> what OpenVINO reports, the precision its plugin takes by itself, whether INT8 is faster.
CPUS = {
    "avx2": (["FP32", "INT8"], "f32", False),
    "vnni": (["FP32", "INT8"], "f32", True),
    "amx": (["BF16", "FP32", "INT8"], "bf16", True),
    "emulated": (["BF16", "FP32"], "f32", True),  # it only emulates bfloat16
    "arm": (["FP32", "FP16"], "f16", True),
}


class Core:
    """An ``openvino.Core`` of another CPU; what it does not answer itself, a real one does."""

    def __init__(self, capabilities: list[str], hint: str, real: Any = None) -> None:
        kind = SimpleNamespace(get_type_name=lambda: hint)
        self._told = {"OPTIMIZATION_CAPABILITIES": capabilities, "INFERENCE_PRECISION_HINT": kind}
        self._real = real

    def get_property(self, device: str, name: str) -> Any:
        assert device == "CPU"
        return self._told[name] if name in self._told else self._real.get_property(device, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def stand_in(monkeypatch: pytest.MonkeyPatch, cpu: str, *, computes: bool = False) -> None:
    """Make the backend believe in another CPU, one that need not compute anything."""
    capabilities, hint, is_fast = CPUS[cpu]
    core = Core(capabilities, hint, _openvino.process_core() if computes else None)
    monkeypatch.setattr(_openvino, "process_core", lambda: core)
    monkeypatch.setattr(_openvino, "has_vnni", lambda: is_fast)


def stand_in_for_all_tests() -> None:
    """The CPU that ZSSEG_TEST_CPU names, if it names one."""
    if os.environ.get("ZSSEG_TEST_CPU"):
        stand_in(pytest.MonkeyPatch(), os.environ["ZSSEG_TEST_CPU"], computes=True)


stand_in_for_all_tests()  # before a test's module asks
needs_vnni = pytest.mark.skipif(
    not _openvino.has_vnni(), reason="needs a CPU with VNNI, AMX or ARM's dot product"
)
