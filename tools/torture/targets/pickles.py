"""Checkpoints of a few kilobytes whose pickles ask for much."""

from __future__ import annotations

import random
import struct
import zipfile
from pathlib import Path

from tools.torture.target import Attempt, target


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


_STORAGE = (
    b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x04tQ"
)
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE + b"K\x00K\x04\x85K\x01\x85\x89}tR"
_PIECES = (
    *(b"(", b"]", b"}", b")", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"R", b"b"),
    *(b"K\x01", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\x00"),
    *(b"\x8a\xff" + b"\xff" * 254 + b"\x7f", b"N", b"\x88", b"G\x7f\xf0" + bytes(6)),
    *(_text("k"), _text("state_dict"), _text("long" * 500), _STORAGE, _TENSOR),
    *(b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"cm\nM\n)\x81", b"cbuiltins\nset\n", b"Q"),
)


@target("pickles", "checkpoints whose pickles name little things many times", group="torch")
def _pickles(folder: Path) -> Attempt:
    from zsseg_rt.models import load_checkpoint

    def attempt(draw: random.Random) -> None:
        path = folder / draw.choice(("a.pth", "a.pt"))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + _program(draw) + b".")
            archive.writestr("a/data/0", bytes(16))
            if path.suffix == ".pt":
                archive.writestr("a/constants.pkl", b"")
                archive.writestr("a/code/m.py", "class M(Module):\n  __parameters__ = []\n")
        load_checkpoint(path)

    return attempt


def _program(draw: random.Random) -> bytes:
    """Things that are remembered and then named again, each many times, in containers."""
    parts = [b"}" if draw.random() < 0.7 else b"cm\nM\n)\x81}"]
    for place in range(draw.randrange(1, 6)):
        parts += [draw.choice(_PIECES) for _ in range(draw.randrange(1, 4))]
        parts.append(b"q" + bytes([place]))
        again = b"h" + bytes([draw.randrange(place + 1)])
        pairs = b"".join(_text(f"k{i}") + again for i in range(draw.choice((1, 30, 200))))
        many = again * draw.choice((1, 50, 3000))
        parts.append(
            draw.choice(
                (
                    b"](" + many + b"e",
                    b"(" + many + b"t",
                    b"}(" + pairs + b"u",
                    b"cm\nM\n)\x81}(" + pairs + b"ub",
                    b"ccollections\nOrderedDict\n" + again + b"\x85R",
                    b"}" + many + b"Ns",
                )
            )
        )
        parts.append(b"q" + bytes([place]))
    end = draw.choice((b"", b"s", _text("w") + b"h\x00s", b"(" + _text("w") + _TENSOR + b"u", b"b"))
    return b"".join(parts) + end
