"""Memory of mapped files is given back and their content stays readable."""

import mmap
import os
import sys

import pytest

from zsseg_rt.backends._openvino import page_out

BYTES = 8 << 20


def resident_bytes(path):
    """What this process holds in memory of a mapped file."""
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0]:
                inside = line.rstrip().endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) << 10
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_pages_of_the_folder_are_given_back(tmp_path):
    inside, outside = tmp_path / "cache" / "a b.blob", tmp_path / "cache2.blob"
    inside.parent.mkdir()
    maps = []
    for path in (inside, outside):
        path.write_bytes(os.urandom(BYTES))
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a dirty page would have to be written first
            maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    contents = [bytes(mapped) for mapped in maps]
    assert resident_bytes(inside) == resident_bytes(outside) == BYTES
    page_out(inside.parent)
    assert resident_bytes(inside) < BYTES // 8
    assert resident_bytes(outside) == BYTES
    assert [bytes(mapped) for mapped in maps] == contents
