"""Every operation against its reference: one table x device, instruction set, threads, layout.

The law is ``zsseg_rt.ops.reference``; ``support.operation_cases`` has a row for each operation.
"""

import inspect

import numpy as np
import pytest

from conftest import CpuDevice
from support.errors import refused
from support.operation_cases import MAKERS, Draw, check_call
from zsseg_rt import ops
from zsseg_rt.errors import ShapeError

ON_CPU_ALONE = {"ink"}
NO_OPERATIONS = {
    *("available_cpu_isas", "cpu_isa", "set_cpu_isa", "get_num_threads", "set_num_threads"),
    *("cuda_device_count", "cuda_device_properties", "cuda_runtime_version", "thread_limit"),
}
every_operation = pytest.mark.parametrize("name", MAKERS)


def test_every_public_operation_has_a_row():
    functions = {name for name in ops.__all__ if not inspect.isclass(getattr(ops, name))}
    functions = {name for name in functions if callable(getattr(ops, name))}
    assert functions - NO_OPERATIONS == set(MAKERS)


@every_operation
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_reference(device, name, seed):
    if device.name != "cpu" and name in ON_CPU_ALONE:
        pytest.skip("runs on the CPU alone")
    for draw in range(8):
        check_call(name, device, MAKERS[name](Draw.seeded(seed, draw)))


@every_operation
@pytest.mark.usefixtures("cpu_isa", "num_threads")
def test_every_instruction_set_and_thread_count(name):
    for seed in range(12):
        check_call(name, CpuDevice(), MAKERS[name](Draw.seeded(99, seed)))


@every_operation
def test_arrays_in_another_order_are_refused(name):
    case = MAKERS[name](Draw.seeded(0, 1))
    arrays = case.narrowed()
    for argument, array in arrays.items():
        if isinstance(array, tuple) or np.asfortranarray(array).flags.c_contiguous:
            continue
        with refused(ShapeError, argument):
            turned = arrays | {argument: np.asfortranarray(array)}
            getattr(ops, name)(**turned, **case.settings)
