"""Damaged and hostile files are read or a typed error, and take no memory for it."""

import contextlib
import json
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
from random import Random

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.errors import refused
from support.fakes import write_fake_bundle
from support.graphs import write_two_inputs
from zsseg_rt import Bundle
from zsseg_rt.common.files import read_npy
from zsseg_rt.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ConfigError,
    DatasetError,
    SourceError,
    VocabularyError,
)
from zsseg_rt.evaluation.datasets.files import read_colour_mask, read_mask
from zsseg_rt.export.words import tokenizer_json
from zsseg_rt.integrations.batch import Journal
from zsseg_rt.models import load_checkpoint, load_clip
from zsseg_rt.models.clip.weights import random_clip
from zsseg_rt.onnx.check import check_graph
from zsseg_rt.photos import read_photo
from zsseg_rt.results.visualize import encode_label_png, read_label_png
from zsseg_rt.text.name_lists import read_name_list
from zsseg_rt.text.tokenizer import Tokenizer, tokenizer_document
from zsseg_rt.torch_files.shapes import Checked

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Duplicate name"),
]
NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
TOKENS = (b"", b"\xff", b"[", b'"', b"9" * 30, b"-", b"(", b"\\ud800", b"\0", b"\r\n")


def damaged(content, random):
    """The content with up to three places altered, or cut off."""
    altered = bytearray(content)
    if random.random() < 0.2:
        del altered[random.randrange(len(altered)) :]
    for _ in range(random.choice([1, 1, 3])):
        # half of the places are in the first bytes, where headers are
        place = random.randrange(min(len(altered), random.choice([100, len(content)])) + 1)
        new = random.choice([*TOKENS, bytes([random.randrange(256)])])
        altered[place : place + random.choice([0, len(new), 8])] = new
    return bytes(altered)


def write_npy(path):
    np.save(path, np.arange(6, dtype=np.float32).reshape(2, 3))


def write_tokenizer(path):
    model = json.loads(tokenizer_json())["model"]
    kept = [token for token, number in model["vocab"].items() if number < 512 + 20]
    tokens = [*kept, "<start_of_text>", "<end_of_text>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    path.write_text(json.dumps(tokenizer_document(vocab, model["merges"][:20])))


def write_image(image):
    return lambda path: cv2.imwrite(str(path), image)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2).half())


def save_checkpoint(path, zipped=True):
    meta = {"epoch": 3, "size": torch.Size([1, 2])}
    content = {"meta": meta, "state_dict": model().state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def save_script(path):
    torch.jit.script(model()[:2]).save(str(path))


def rewrite(path, change):
    """Replace an archive by one with what ``change`` makes of each entry's name and content."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def write_pickle(save):
    """The pickle of an archive, which lies beside it."""

    def write(path):
        save(path.with_suffix(".pkl.pt"))
        with zipfile.ZipFile(path.with_suffix(".pkl.pt")) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            path.write_bytes(archive.read(name))

    return write


def read_pickle(path):
    """Its archive with it, whose checksum then is right."""
    archive, own = path.with_suffix(".pkl.pt"), path.read_bytes()
    rewrite(archive, lambda name, content: own if name.endswith("/data.pkl") else content)
    read_checkpoint(archive)


def read_checkpoint(path):
    with contextlib.suppress(CheckpointError):
        load_clip(path)
    load_checkpoint(path)


KINDS = {  # a file: what writes it, what reads it, the error that it may raise, how often
    "rows.npy": (
        write_npy, lambda path: read_npy(path.read_bytes(), what="rows.npy", max_bytes=24),
        ValueError, 400,
    ),
    "a.mask.png": (
        lambda path: path.write_bytes(encode_label_png(NOISE[..., 0], NOISE[0])), read_label_png,
        SourceError, 100,
    ),
    **{
        f"photo.{suffix}": (write_image(NOISE), read_photo, SourceError, 40)
        for suffix in ("bmp", "jpg", "png", "tif", "webp")
    },
    "mask.png": (write_image(NOISE[..., 0]), read_mask, DatasetError, 40),
    "mask.tif": (write_image(NOISE[..., 0]), read_mask, DatasetError, 40),
    "mask.bmp": (write_image(NOISE[..., 0]), read_colour_mask, DatasetError, 40),
    "bundle.json": (
        lambda path: write_fake_bundle(path.parent), lambda path: Bundle.load(path.parent).verify(),
        BundleError, 150,
    ),
    "tokenizer.json": (
        write_tokenizer, lambda path: Tokenizer(path).encode(["a red dog"]), BundleError, 100
    ),
    "names.txt": (
        lambda path: path.write_text("0 road\n1 sky, cloud\n2 __ignore__\n"),
        lambda path: read_name_list(path, ConfigError, with_ids=True).groups,
        (ConfigError, VocabularyError), 100,
    ),
    "journal.jsonl": (
        lambda path: path.write_text('{"record": {"key": "a"}, "sha256": "b"}\n'),
        lambda path: Journal(path, "key").read(), (), 100,
    ),
    "g.onnx": (write_two_inputs, check_graph, BackendError, 600),
    "a.pth": (save_checkpoint, read_checkpoint, CheckpointError, 75),
    "old.pth": (lambda path: save_checkpoint(path, False), read_checkpoint, CheckpointError, 150),
    "a.safetensors": (
        lambda path: save_file(model().state_dict(), path), read_checkpoint, CheckpointError, 150
    ),
    "script.pt": (save_script, read_checkpoint, CheckpointError, 75),
    "a.pkl": (write_pickle(save_checkpoint), read_pickle, CheckpointError, 75),
    "script.pkl": (write_pickle(save_script), read_pickle, CheckpointError, 75),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_it_is_read_or_refused_by_name(name, tmp_path):
    write, read, kind, times = KINDS[name]
    path, random, count = tmp_path / "fake.zsseg" / name, Random(0), 0
    if name != "bundle.json":
        path.parent.mkdir()
    write(path)
    content = path.read_bytes()
    read(path)
    for _ in range(times):
        path.write_bytes(damaged(content, random))
        try:
            read(path)
        except kind as error:
            text, count = str(error), count + 1
            assert path.name in text or path.parent.name in text
            assert "\n" not in text
    assert count or not kind


# --- pickles that ask for much, and archives of TorchScript, whose code is never run --------------


def pickled(*instructions):
    """A pickle of a state_dict with one float32 tensor, whose last parts are given."""
    return b"".join(
        [
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(",
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu",
            b"K\x04tQ",
            *instructions,
            b"\x89}tRs.",
        ]
    )


def number(value):
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + data


def tensor(offset, shape, stride):
    return pickled(number(offset), number(shape) + b"\x85", number(stride) + b"\x85")


def save_archive(path, pickle_bytes, storage=bytes(16), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickle_bytes)
        archive.writestr("a/data/0", storage)
    return path


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    path = save_archive(tmp_path / "a.pth", tensor(0, 4, 1), struct.pack("4f", 1, 2, 3, 4))
    assert load_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]
    for parts in (
        (0, 5, 1), (1, 4, 1), (0, 4, 2), (-1, 4, 1), (0, -4, 1), (0, 4, -1), (2**62, 1, 1),
        (0, 2**62, 0), (0, 2**40, 0), (2**70, 1, 1), (0, 2, 2**70),
    ):  # fmt: skip
        save_archive(path, tensor(*parts))
        with refused(CheckpointError, "a.pth"):
            load_checkpoint(path)


def test_small_files_take_little_memory(tmp_path):
    """Compressed zeros, entries that share their bytes, tensors that repeat one number."""
    good = pickled(number(0), b"K\x04\x85", b"K\x01\x85")
    save_archive(tmp_path / "bomb.pth", good, bytes(1 << 27), zipfile.ZIP_DEFLATED)
    save_archive(tmp_path / "wide.pth", tensor(0, 1 << 30, 0))
    memo = good[:-1] + b"r\xff\xff\xff\x7f."  # the place in the memo makes Python's own take 16 GB
    save_archive(tmp_path / "memo.pth", memo)
    tracemalloc.start()
    for name in ("bomb.pth", "wide.pth"):
        with pytest.raises(CheckpointError, match="larger than the file"):
            load_checkpoint(tmp_path / name)
    load_checkpoint(tmp_path / "memo.pth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def huge(value):
    return b"\x8a\xff" + value.to_bytes(255, "little")


def entries(keys, value=b"N"):
    return b"(" + b"".join(key + value for key in keys) + b"u"


TENSOR = pickled(number(0), b"K\x04\x85", b"K\x01\x85")[9:-2]  # without the dictionary around it
ORDERED = b"ccollections\nOrderedDict\n"
SHAPED = TENSOR.split(b"Q")[0] + b"QK\x00"  # to be followed by shape, strides and the rest
PAIRS = b"](" + b"".join(text(f"{i:03}") + b"K\x01\x86" for i in range(300)) + b"eq\x01"
WIDE = b"](" + b"(" + b"K\x01" * 100_000 + b"tq\x01"  # a list that begins with a wide tuple
END = b"\x89}tR"
COLLIDING = (number(i * (2**61 - 1)) for i in range(1, 60_000))
ASKING = {  # each asks for far more than its own size
    "one list made into many dictionaries": b"]("
    + PAIRS
    + (ORDERED + b"h\x01\x85R") * 60_000
    + b"e.",
    "pairs of many parts": WIDE + b"(" + b"h\x01" * 4000 + b"tq\x02" + ORDERED + b"h\x02\x85Re.",
    "a shape of huge numbers": b"]"
    + huge(2**2039 - 1)
    + b"q\x01a}"
    + text("w")
    + (SHAPED + b"(" + b"h\x01" * 100_000 + b"t(" + b"K\x01" * 100_000 + b"t" + END + b"s."),
    "nested tuples": b"}" + b")" + b"\x85" * 10_000 + b"K\x01s.",
    "nested lists": b"}" + b"]" * 1000 + b"a" * 999 + b"K\x01s.",
    "a shape of many axes": WIDE + (SHAPED + b"h\x01h\x01" + END) * 20_000 + b"e.",
    "many tuples as keys": b"}" + entries(text(str(i)) + b"K\x01\x86" for i in range(2000)) + b".",
    "a wide tuple as key": WIDE + b"}" + entries([b"h\x01"] * 60_000) + b"e.",
    "numbers as keys that share a hash": b"}" + entries(COLLIDING) + b".",
    "tuples of long texts as names": b"}("
    + (text("y" * (1 << 20)) + b"q\x01K\x01\x86" + TENSOR + b"q\x02")
    + b"".join(b"h\x01h\x01M" + struct.pack("<H", i) + b"\x87h\x02" for i in range(500))
    + b"u.",
}
SLOW = ("one list made into many dictionaries", "a shape of huge numbers")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.nightly] * (n in SLOW)) for n in ASKING]
)
def test_what_a_pickle_asks_for_is_bounded(tmp_path, name):
    save_archive(tmp_path / "a.pth", b"\x80\x02" + ASKING[name])
    began = time.process_time()
    tracemalloc.start()
    with refused(CheckpointError, "a.pth") as error:
        load_checkpoint(tmp_path / "a.pth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (256 << 20)
    assert time.process_time() - began < 20
    assert len(str(error.value)) < 2000


def test_layers_are_counted_by_those_there():
    """Not by the number in a name, which a model of as many layers would be made for."""
    for number in ("1", "99999999999", "9" * 5000):
        there = {"layers.0.weight": torch.zeros(1), f"layers.{number}.weight": torch.zeros(1)}
        assert Checked(tensors=there, what="CLIP").depth("layers.") == 2


class Block(nn.Module):
    """Tensors of several types and strides, and attributes that are no tensors."""

    names: list[str]
    pair: tuple[int, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
        self.small = nn.Parameter(torch.randn(5, 3).bfloat16())
        base = torch.arange(24.0)
        buffers = {"octets": torch.arange(7, dtype=torch.uint8), "empty": torch.zeros(0, 4)}
        buffers |= {"scalar": torch.tensor(2.5).double(), "waves": torch.randn(3).cfloat()}
        buffers |= {"base": base, "part": base[4:16].view(3, 4), "turned": base.view(4, 6).t()}
        buffers |= {"spread": torch.ones(1).expand(9), "mask": torch.eye(2).bool(), "absent": None}
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.plain = torch.arange(3)  # a tensor that is neither parameter nor buffer
        self.names, self.pair = ["a", "b"], (1, torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x)).sum() + self.plain.sum()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.again = self.first
        self.blocks = nn.ModuleList([Block()])
        self.tied = nn.Parameter(self.first.small)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) + self.first(x)


@pytest.mark.parametrize("scripted", [True, False])
def test_tensors_are_those_of_torch(tmp_path, scripted):
    torch.manual_seed(0)
    module, path = Outer().train(scripted), str(tmp_path / "a.pt")
    image = torch.zeros(1, 3, 5, 5)
    (torch.jit.script(module) if scripted else torch.jit.trace(module, image)).save(path)
    expected, tensors = torch.jit.load(path).state_dict(), load_checkpoint(path)
    assert tensors.keys() >= expected.keys()
    assert len(expected) > 30
    for key, value in expected.items():
        assert (tensors[key].dtype, tensors[key].shape) == (value.dtype, value.shape)
        assert tensors[key].stride() == value.stride() or not value.numel()
        assert torch.equal(tensors[key], value)
        assert not tensors[key].requires_grad


class Evil(nn.Module):
    """Writes a file when an archive that holds it is loaded by torch."""

    path: str
    weight: Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.weight = path, torch.zeros(2)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, Tensor, bool]:
        return (self.path, self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, Tensor, bool]) -> None:
        self.path = state[0]
        self.training = state[2]
        written = torch.from_file(state[0], True, 3, dtype=torch.uint8)
        written.copy_(torch.tensor([104, 105, 10], dtype=torch.uint8))
        self.weight = state[1] + written.sum()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def test_code_of_a_file_is_never_run(tmp_path):
    """Nor does OpenCLIP get a path: it would load a folder's or a file's weights itself."""
    path, target = tmp_path / "evil.pt", tmp_path / "written"

    class Opens:
        def __reduce__(self):
            return (open, (str(target), "w"))

    plain = save_archive(tmp_path / "a.pth", pickle.dumps({"state_dict": Opens()}, protocol=2))
    torch.jit.script(nn.Sequential(Evil(str(target)), nn.Linear(2, 2))).save(str(path))
    target.unlink(missing_ok=True)
    for load, file in ((load_checkpoint, plain), (load_checkpoint, path), (load_clip, path)):
        with refused(CheckpointError, file.name):
            load(file)
    pytest.importorskip("open_clip")
    for architecture in (f"local-dir:{tmp_path}", str(path), "hf-hub:nobody/nothing"):
        with refused(CheckpointError, "source"):
            load_clip("openai", architecture=architecture)
        with refused(CheckpointError, "clip"):
            random_clip(architecture)
    assert not target.exists()
    torch.jit.load(str(path))  # what was done before
    assert target.read_bytes() == b"hi\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"FloatStorage", b"QInt8Storage", "made by torch._utils._rebuild_tensor"),
        (b"torch._utils\n_rebuild_tensor_v2", b"posix\nsystem", "made by posix.system"),
        (b"_rebuild_tensor_v2", b"_rebuild_qtensor", "made by torch._utils._rebuild_qtensor"),
        (b"little", b"big", "big-endian"),
    ],
)
def test_strange_tensors_and_byte_orders_are_refused(tmp_path, old, new, message):
    save_script(tmp_path / "a.pt")
    rewrite(
        tmp_path / "a.pt",
        lambda name, content: content if "/code/" in name else content.replace(old, new),
    )
    with pytest.raises(CheckpointError, match=f"a.pt: .*{message}"):
        load_checkpoint(tmp_path / "a.pt")


def test_modules_that_hold_themselves_are_refused(tmp_path):
    save_archive(
        tmp_path / "a.pt", b"\x80\x02c__torch__\nA\n)\x81q\x00}(X\x01\x00\x00\x00mh\x00ub."
    )
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("a/constants.pkl", b"")
    with refused(CheckpointError, "a.pt"):
        load_checkpoint(tmp_path / "a.pt")
