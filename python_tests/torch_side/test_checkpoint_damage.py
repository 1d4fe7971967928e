"""Damaged and hostile checkpoint files load or are a CheckpointError, and take no memory for it."""

import pickle
import random
import struct
import time
import tracemalloc
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.errors import refused
from zsseg_rt.errors import CheckpointError
from zsseg_rt.models import load_checkpoint, load_clip
from zsseg_rt.models.clip.weights import random_clip
from zsseg_rt.torch_files.shapes import Checked

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Duplicate name"),
]
FORMS = {"zip": "a.pth", "legacy": "a.pth", "torchscript": "a.pt", "safetensors": "a.safetensors"}
CASES = 150  # of each form


def write(form, path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2).half())
    if form == "torchscript":
        torch.jit.script(model[:2]).save(str(path))
    elif form == "safetensors":
        save_file(model.state_dict(), path)
    else:
        meta = {"epoch": 3, "size": torch.Size([1, 2])}
        content = {"meta": meta, "state_dict": model.state_dict()}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path.read_bytes()


def damage(content, draw):
    """Flip bits, cut, insert, or copy a piece elsewhere."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(content))
        kind = draw.randrange(5)
        if kind <= 1:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            content[place] = draw.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 3:
            begin = draw.randrange(len(content))
            piece = content[begin : begin + draw.randrange(1, 16)]
            content[place : place + len(piece)] = piece
        else:
            del content[place:]
            content = content or bytearray(b"\x80")
    return bytes(content)


def damage_pickle(content, draw):
    """Damage the pickle of an archive, whose checksum then is right."""
    with zipfile.ZipFile(content) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(content, "w") as archive:
        for entry, data in entries:
            hit = entry.filename.endswith("/data.pkl")
            archive.writestr(entry, damage(data, draw) if hit else data)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_bytes_load_or_are_refused(tmp_path, form):
    path = tmp_path / FORMS[form]
    whole, draw, refused = write(form, path), random.Random(1), 0
    for case in range(CASES):
        path.write_bytes(whole)
        if case % 2 and form in ("zip", "torchscript"):
            damage_pickle(path, draw)
        else:
            path.write_bytes(damage(whole, draw))
        for load in (load_checkpoint, load_clip):
            try:
                load(path)
            except CheckpointError:
                refused += 1
    assert refused > CASES


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


def save_archive(path, pickle_bytes, storage=bytes(16), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickle_bytes)
        archive.writestr("a/data/0", storage)


def test_the_archive_that_is_not_hostile_loads(tmp_path):
    content = pickled(number(0), b"K\x04\x85", b"K\x01\x85")
    save_archive(tmp_path / "a.pth", content, struct.pack("4f", 1, 2, 3, 4))
    assert load_checkpoint(tmp_path / "a.pth")["w"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, 5, 1),
        (1, 4, 1),
        (0, 4, 2),
        (-1, 4, 1),
        (0, -4, 1),
        (0, 4, -1),
        (2**62, 1, 1),
        (0, 2**62, 0),
        (0, 2**40, 0),
        (2**70, 1, 1),
        (0, 2, 2**70),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, offset, shape, stride):
    content = pickled(number(offset), number(shape) + b"\x85", number(stride) + b"\x85")
    save_archive(tmp_path / "a.pth", content)
    with refused(CheckpointError, "a.pth"):
        load_checkpoint(tmp_path / "a.pth")


def test_small_files_take_little_memory(tmp_path):
    """Compressed zeros, entries that share their bytes, tensors that repeat one number."""
    good = pickled(number(0), b"K\x04\x85", b"K\x01\x85")
    save_archive(tmp_path / "bomb.pth", good, bytes(1 << 27), zipfile.ZIP_DEFLATED)
    wide = pickled(number(0), number(1 << 30) + b"\x85", b"K\x00\x85")
    save_archive(tmp_path / "wide.pth", wide)
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


def test_nothing_that_a_pickle_names_is_imported_or_called(tmp_path):
    class Opens:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    inner = pickle.dumps({"state_dict": Opens()}, protocol=2)
    save_archive(tmp_path / "a.pth", inner)
    with refused(CheckpointError, "a.pth"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "opened").exists()


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
    "asked",
    [
        pytest.param(asked, id=name, marks=[pytest.mark.nightly] * (name in SLOW))
        for name, asked in ASKING.items()
    ],
)
def test_what_a_pickle_asks_for_is_bounded(tmp_path, asked):
    save_archive(tmp_path / "a.pth", b"\x80\x02" + asked)
    began = time.process_time()
    tracemalloc.start()
    with refused(CheckpointError, "a.pth") as error:
        load_checkpoint(tmp_path / "a.pth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (256 << 20)
    assert time.process_time() - began < 20
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("number", ["1", "99999999999", "9" * 5000])
def test_layers_are_counted_by_those_there(number):
    """Not by the number in a name, which a model of as many layers would be made for."""
    there = {"layers.0.weight": torch.zeros(1), f"layers.{number}.weight": torch.zeros(1)}
    assert Checked(tensors=there, what="CLIP").depth("layers.") == 2


# --- TorchScript archives give torch.jit.load's tensors, and none of their code is run ---


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


class Evil(nn.Module):
    """Writes a file when an archive that holds it is loaded by torch."""

    path: str
    weight: Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = torch.zeros(2)

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


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.extra = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.extra


@pytest.fixture
def evil(tmp_path):
    target = tmp_path / "written"
    torch.jit.script(Holder(Evil(str(target)))).save(str(tmp_path / "evil.pt"))
    target.unlink(missing_ok=True)
    return tmp_path / "evil.pt", target


def save(module, path, form):
    image = torch.zeros(1, 3, 5, 5)
    jitted = torch.jit.script(module) if form == "scripted" else torch.jit.trace(module, image)
    jitted.save(str(path))
    return torch.jit.load(str(path)).state_dict()


def rewrite(path, change):
    """Replace an archive by one whose entries ``change`` gives, by name."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        for name, content in change(entries).items():
            archive.writestr(name, content)


@pytest.mark.parametrize("form", ["scripted", "traced"])
@pytest.mark.parametrize("training", [True, False])
def test_tensors_are_those_of_torch(tmp_path, form, training):
    torch.manual_seed(0)
    expected = save(Outer().train(training), tmp_path / "a.pt", form)
    tensors = load_checkpoint(tmp_path / "a.pt")
    assert tensors.keys() >= expected.keys()
    assert len(expected) > 30
    for key, value in expected.items():
        assert tensors[key].dtype == value.dtype
        assert tensors[key].shape == value.shape
        assert tensors[key].stride() == value.stride() or not value.numel()
        assert torch.equal(tensors[key], value)
        assert not tensors[key].requires_grad


def test_code_of_an_archive_is_never_run(evil):
    path, target = evil
    with refused(CheckpointError, "evil.pt"):
        load_checkpoint(path)
    with refused(CheckpointError, "evil.pt"):
        load_clip(path)
    assert not target.exists()
    torch.jit.load(str(path))  # what was done before
    assert target.read_bytes() == b"hi\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"FloatStorage", b"QInt8Storage", "made by torch._utils._rebuild_tensor"),
        (b"torch._utils\n_rebuild_tensor_v2", b"posix\nsystem", "made by posix.system"),
        (b"_rebuild_tensor_v2", b"_rebuild_qtensor", "made by torch._utils._rebuild_qtensor"),
    ],
)
def test_strange_tensors_are_refused(tmp_path, old, new, message):
    save(Holder(nn.ReLU()), tmp_path / "a.pt", "scripted")
    rewrite(
        tmp_path / "a.pt",
        lambda entries: {
            name: content.replace(old, new) if name.endswith("/data.pkl") else content
            for name, content in entries.items()
        },
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pt")


def test_numbers_of_another_byte_order_are_refused(tmp_path):
    save(Holder(nn.ReLU()), tmp_path / "a.pt", "scripted")
    rewrite(tmp_path / "a.pt", lambda entries: entries | {"a/byteorder": b"big"})
    with refused(CheckpointError, "a.pt"):
        load_checkpoint(tmp_path / "a.pt")


def test_modules_that_hold_themselves_are_refused(tmp_path):
    body = b"\x80\x02c__torch__\nA\n)\x81q\x00}(X\x01\x00\x00\x00mh\x00ub."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", body)
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/code/__torch__.py", "class A(Module):\n  __parameters__ = []\n")
    with refused(CheckpointError, "a.pt"):
        load_checkpoint(tmp_path / "a.pt")


def test_open_clip_is_given_no_path(evil):
    """It would load a folder's or a file's weights itself."""
    pytest.importorskip("open_clip")
    path, target = evil
    for architecture in (f"local-dir:{path.parent}", str(path), "hf-hub:nobody/nothing"):
        with refused(CheckpointError, "source"):
            load_clip("openai", architecture=architecture)
        with refused(CheckpointError, "clip"):
            random_clip(architecture)
    assert not target.exists()
