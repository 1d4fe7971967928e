"""TorchScript archives give torch.jit.load's tensors, and none of their code is run."""

import warnings
import zipfile

import pytest

from support import tiny
from support.command_line import run

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from support.errors import refused  # noqa: E402
from zsseg_rt.errors import CheckpointError  # noqa: E402
from zsseg_rt.models import load_checkpoint, load_clip  # noqa: E402
from zsseg_rt.models.clip.weights import random_clip  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


class Block(nn.Module):
    """Parameters and buffers of several types, and attributes that are no tensors."""

    names: list[str]
    sizes: dict[str, int]
    pair: tuple[int, Tensor]
    spare: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False))
        self.small = nn.Parameter(torch.randn(5, 3).half())
        self.brain = nn.Parameter(torch.randn(2).bfloat16())
        self.register_buffer("mask", torch.tensor([[True, False], [False, True]]))
        self.register_buffer("octets", torch.arange(7, dtype=torch.uint8))
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("waves", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("absent", None)
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.plain = torch.arange(3)  # a tensor that is neither parameter nor buffer
        self.count = 3
        self.scale = 0.125
        self.flag = True
        self.many = -(2**40)
        self.names = ["a", "b"]
        self.sizes = {"a": 1}
        self.pair = (1, torch.ones(2))
        self.spare = [torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.norm(x)) * self.scale + self.plain.sum()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.again = self.first
        self.blocks = nn.ModuleList([Block(), Block()])
        base = torch.arange(24.0)
        self.register_buffer("base", base)
        self.register_buffer("part", base[4:16].view(3, 4))
        self.register_buffer("turned", base.view(4, 6).t())
        self.register_buffer("steps", base[1::3])
        self.register_buffer("spread", torch.ones(1).expand(9))
        self.tied = nn.Parameter(self.first.small)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](x) + self.first(x).mean() + self.base.sum()


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
    made = torch.jit.script(module) if form == "scripted" else torch.jit.trace(module, image)
    made.save(str(path))
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
    found = load_checkpoint(tmp_path / "a.pt")
    assert found.keys() >= expected.keys()
    assert len(expected) > 30
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        assert found[key].stride() == value.stride() or not value.numel()
        assert torch.equal(found[key], value)
        assert not found[key].requires_grad


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
    "command",
    [
        ["import-checkpoint", "zegclip", "EVIL"],
        ["import-checkpoint", "clip_rc", "EVIL"],
        ["import-checkpoint", "zegformer", "EVIL"],
        ["import-checkpoint", "zegformer", "GOOD", "--clip", "EVIL"],
        ["export", "dense-clip", "--pretrained", "EVIL"],
        ["export", "zeroseg", "EVIL", "--text", "GOOD", "--text-activation", "quick_gelu"],
    ],
)
def test_no_command_runs_it(evil, tmp_path, capsys, command):
    path, target = evil
    torch.save(tiny.clip_state_dict(), tmp_path / "good.pth")
    names = {"EVIL": str(path), "GOOD": str(tmp_path / "good.pth")}
    words = [names.get(word, word) for word in command]
    assert run(*words, "--out", tmp_path / "x.zsseg") == 1
    assert "evil.pt: expected a checkpoint file" in capsys.readouterr().err
    assert not target.exists()
    assert not (tmp_path / "x.zsseg").exists()


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
