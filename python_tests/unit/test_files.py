"""Damaged or hostile ``.npy`` content is a ValueError, and sound content comes back as it was."""

import io

import numpy as np
import pytest

from zsseg_rt.common.files import read_npy

HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s}\n"


def npy(array, **kwargs):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asanyarray(array), **kwargs)
    return content.getvalue()


def with_header(header, values=b""):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values


def read(data, max_bytes=1 << 20):
    return read_npy(data, what="rows.npy", max_bytes=max_bytes)


@pytest.mark.parametrize(
    "dtype", ["?", "i1", "u1", "<i2", "<u4", "<i8", "<f2", "<f4", ">f4", "<f8", "<U5"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 5), (1,) * 32], ids=str)
def test_reads_what_numpy_writes(shape, dtype):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for stored in (array, np.asfortranarray(array)):
        for version in ((1, 0), (2, 0)):
            data = npy(stored, version=version)
            rows, expected = read(data), np.load(io.BytesIO(data))
            np.testing.assert_array_equal(rows, expected)
            assert rows.dtype == expected.dtype
            assert rows.flags.writeable
            assert rows.flags.c_contiguous == expected.flags.c_contiguous
    data = with_header(HEADER % b"(2,)", bytes(8))  # without padding and the last comma
    np.testing.assert_array_equal(read(data), np.zeros(2, np.float32))


SMALL = npy(np.arange(6, dtype=np.float32).reshape(2, 3))
TEXT = npy(np.array(["ab"]))[:-4]
HOSTILE = {
    "empty": (b"", "expected a .npy file"),
    "text": (b"0.1 0.2 0.3 0.4", "expected a .npy file"),
    "magic alone": (SMALL[:7], "expected a .npy file"),
    "format 4.0": (SMALL[:6] + b"\x04" + SMALL[7:], "4.0 instead of 1.0"),
    "length of 4 GB": (SMALL[:6] + b"\x02\x00" + b"\xff" * 4, "expected a .npy file"),
    "cut in the header": (SMALL[:40], "expected a .npy file"),
    "cut in the values": (SMALL[:-1], r"expected 24 bytes of float32 \[2, 3\], got 23"),
    "more behind": (SMALL + b"\0", "expected 24 bytes of float32 .* got 25"),
    "open string": (SMALL.replace(b"'shape':", b"'shape :"), "expected a .npy file"),
    "open bracket": (SMALL.replace(b"(2, 3)", b"((2, 3"), "expected a .npy file"),
    "brackets": (with_header(HEADER % (b"(" * 900)), "expected a .npy file"),
    "code": (SMALL.replace(b"False", b"1//0 "), "expected a .npy file"),
    "objects": (SMALL.replace(b"<f4", b"|O8"), "expected a .npy file"),
    "long double": (SMALL.replace(b"<f4", b"<f16"), "expected a .npy file"),
    "records": (SMALL.replace(b"'<f4'", b"'i4,f'"), "expected a .npy file"),
    "negative": (SMALL.replace(b"(2, 3)", b"(-2,3)"), "sizes"),
    "overflow": (with_header(HEADER % (b"(%d, %d, 0)" % (2**53, 2**53))), "got float32 .*, 0"),
    "huge": (SMALL.replace(b"(2, 3), }    ", b"(9999999, 3)}"), "at most 1048576 bytes"),
} | {
    hex(code): (TEXT + code.to_bytes(4, "little"), "a character that Unicode does not have")
    for code in (0xD800, 0xDFFF, 0x110000, 0xFFFFFFFF)
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_odd_content_is_a_value_error_with_its_reason(name):
    data, reason = HOSTILE[name]
    with pytest.raises(ValueError, match=f"rows.npy: .*{reason}"):
        read(data)


def test_limit_counts_the_values_alone():
    data = npy(np.zeros(100, np.float32))
    assert read(data, max_bytes=400).shape == (100,)
    with pytest.raises(ValueError, match=r"at most 399 bytes, got float32 \[100\]"):
        read(data, max_bytes=399)
