"""What the emulated GPU has been asked to do."""

import ctypes
from collections.abc import Callable

import pytest

from zsseg_rt import _C

# As in cuda_emulation::Counts.
FIELDS = (
    "launches",
    "kernels",
    "allocations",
    "kept_allocations",
    "frees",
    "copies_to_device",
    "copies_to_host",
    "copies_on_device",
    "events_made",
    "events_recorded",
    "stream_waits",
    "host_waits",
    "graph_launches",
    "pinned_allocations",
    "pinned_frees",
)


def counts_reader() -> Callable[[], dict[str, int]]:
    """Return what reads the counts; skip on a real GPU."""
    library = ctypes.CDLL(_C.__file__)
    if not hasattr(library, "cuda_emulation_counts"):
        pytest.skip("only the emulated GPU counts calls")
    fields = (ctypes.c_uint64 * len(FIELDS))()

    def read() -> dict[str, int]:
        assert library.cuda_emulation_counts(fields) == len(FIELDS)
        return dict(zip(FIELDS, fields, strict=True))

    return read
