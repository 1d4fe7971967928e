"""Counts of calls to the GPU."""

import ctypes
from collections.abc import Callable

import pytest

from zsseg_rt import _C
from zsseg_rt.ops import core

# As in cuda_emulation::Counts.
FIELDS = (
    *("launches", "kernels", "allocations", "kept_allocations", "frees", "copies_to_device"),
    *("copies_to_host", "copies_on_device", "events_made", "events_recorded", "stream_waits"),
    *("host_waits", "graph_launches", "pinned_allocations", "pinned_frees"),
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


def count_captures(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return counts that grow while captures are ``recorded`` and ``launched``."""
    counts = {"recorded": 0, "launched": 0}

    class Counting(core.Capture):
        def end(self) -> None:
            super().end()
            counts["recorded"] += 1

        def launch(self, stream: int) -> None:
            counts["launched"] += 1
            super().launch(stream)

    monkeypatch.setattr(core, "Capture", Counting)
    return counts
