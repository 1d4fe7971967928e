"""A golden sample that is damaged, or made to cost memory, is a BundleError."""

import io
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from support.command_line import memory_of_refusal
from support.errors import refused
from zsseg_rt import Bundle, BundleError, Engine, EngineConfig
from zsseg_rt.bundles.specs import FileEntry
from zsseg_rt.demo import demo_bundle
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.self_check import check_against_golden, read_golden


def read(bundle):
    return read_golden(bundle, create_family(bundle, EngineConfig()))


def check(engine, bundle):
    return check_against_golden(bundle, engine._family, "float32", engine._run_golden)


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(demo_bundle("scenes"), tmp_path / "x.zsseg")


@pytest.fixture(scope="module")
def engine():
    with Engine(demo_bundle("scenes"), EngineConfig(use_cache=False)) as engine:
        yield engine


@pytest.fixture(scope="module")
def sound():
    return read(Bundle.load(demo_bundle("scenes")))


def put(bundle, content):
    """Give the bundle another golden.npz, with the hash that fits; the bundle as it is read."""
    (bundle / "golden.npz").write_bytes(content)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["golden"] = vars(FileEntry.describe(bundle / "golden.npz", bundle))
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    return Bundle.load(bundle)


def npz(arrays, *, compression=zipfile.ZIP_DEFLATED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(array))
    return content.getvalue()


def test_golden_samples_are_read_as_numpy_reads_them(sound):
    with np.load(demo_bundle("scenes") / "golden.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted(sound)
        for name in archive.files:
            np.testing.assert_array_equal(sound[name], archive[name])


def framed(*size_hw):
    return {"frame": np.zeros((*size_hw, 3), np.uint8), "labels": np.zeros(size_hw, np.uint8)}


ODD_ARRAYS = {
    "narrow embeddings": {"text_embeds": np.ones((28, 3), np.float32)},
    "embeddings of NaN": {"text_embeds": np.full((28, 128), np.nan, np.float32)},
    "one name for all": {"class_names": np.array(["a"] * 28)},
    "a wide frame": framed(1, 40000),
    "labels of another size": {"labels": np.zeros((3, 4), np.uint8)},
    "signed labels": {"labels": np.zeros((120, 160), np.int64)},
    "a grey frame": {"frame": np.zeros((120, 160), np.uint8)},
    "a frame of floats": {"frame": np.zeros((120, 160, 3))},
    "no frame": {"frame": None},
    "no names": {"class_names": np.zeros(0, "U3"), "text_embeds": np.zeros((0, 64), np.float32)},
    "names that are numbers": {"class_names": np.zeros(5)},
    "fewer embeddings": {"text_embeds": np.zeros((2, 64), np.float32)},
    "logits of other classes": {"mask_logits": np.zeros((1, 3, 4, 4), np.float32)},
    "flat logits": {"mask_logits": np.zeros(7, np.float32)},
    "a stage of text": {"image": np.array(["x"])},
    "a large frame of many classes": framed(4000, 4000),  # to which every class is upsampled
}


@pytest.mark.parametrize("name", ODD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused(name, bundle, sound, engine):
    arrays = {k: v for k, v in (sound | ODD_ARRAYS[name]).items() if v is not None}
    with refused(BundleError, None, "golden"):
        check(engine, put(bundle, npz(arrays)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([zipfile.ZipInfo("a.txt")], "'a.txt', which is not a .npy array"),
        ([zipfile.ZipInfo("a.npy")] * 2, "2 arrays, where at most 64 with distinct names may"),
        ([zipfile.ZipInfo(f"{i}.npy") for i in range(65)], "65 arrays"),
        ([zipfile.ZipInfo("../a.npy")], "expected a .npy file"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_with_odd_entries_are_refused(entries, message, bundle):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for entry in entries:
            archive.writestr(entry, b"")
    with pytest.raises(BundleError, match=re.escape(message)):
        read(put(bundle, content.getvalue()))


def test_embeddings_of_the_regions_must_fit_too(tmp_path):
    stored = Path(__file__).parents[1] / "bundles" / "v1" / "proposals.zsseg"
    bundle = shutil.copytree(stored, tmp_path / "x.zsseg")
    arrays = read(Bundle.load(bundle)) | {"region_text_embeds": np.zeros((2, 2), np.float32)}
    with refused(BundleError, None, "class_names", "text_embeds"):
        read(put(bundle, npz(arrays)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_small_file_with_gigabytes_of_zeros_takes_no_memory(bundle):
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("image", "patch_embeds"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": (300 << 20,)}
                np.lib.format.write_array_header_1_0(stream, header)
                for _ in range(300):
                    stream.write(bytes(1 << 20))
    put(bundle, zeros.getvalue())
    setup = """
from zsseg_rt import Bundle, EngineConfig
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.self_check import read_golden
bundle = Bundle.load(sys.argv[1])
family = create_family(bundle, EngineConfig())
"""
    megabytes, message = memory_of_refusal(setup, "read_golden(bundle, family)", bundle)
    assert "bytes of arrays, where at most 268435456 may" in message
    assert megabytes < 50  # the arrays are 600


def test_damaged_samples_are_read_or_refused(bundle, engine):
    """Any byte of the archive; the self-check computes with what is read."""
    rng, data = np.random.default_rng(0), (demo_bundle("scenes") / "golden.npz").read_bytes()
    refused = 0
    for _ in range(80):
        damaged = bytearray(data[: rng.integers(1, len(data)) if rng.random() < 0.2 else None])
        last = rng.random() < 0.5  # the table of contents
        low = max(len(damaged) - 1500, 0) if last else 0
        for place in rng.integers(low, len(damaged), 3):
            damaged[place] = rng.integers(0, 256)
        try:
            check(engine, put(bundle, bytes(damaged)))
        except BundleError:
            refused += 1
    assert refused > 50
