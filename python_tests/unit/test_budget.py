"""How many lines each room of the package may have.

A number only falls, or rises by what another gives up in the same commit. Counted are lines of
``.py`` files, as ``find zsseg_rt -name '*.py' | xargs cat | wc -l`` does.
"""

from pathlib import Path

import pytest

import zsseg_rt

PACKAGE = Path(zsseg_rt.__file__).parent
MOST = 49_810  # the whole package; below the rooms' sum, so that not all of them may be full
ROOMS = {
    "root": 1_185,
    "common": 1_550,
    "ops": 1_295,
    "backends": 2_910,
    "runtime": 4_445,
    "text": 1_430,
    "bundles demo fetch": 1_515,
    "results": 1_125,
    "photos": 500,
    "stream": 4_605,
    "server": 1_850,
    "profiling": 2_370,
    "evaluation": 1_445,
    "cli": 2_870,
    "integrations": 775,
    "models": 4_805,
    "export": 3_420,
    "networks": 2_355,
    "onnx": 3_230,
    "training": 4_110,
    "torch_files": 2_065,
}


def lines_of(room: str) -> int:
    if room == "root":
        files = list(PACKAGE.glob("*.py"))
    else:
        files = [path for folder in room.split() for path in (PACKAGE / folder).rglob("*.py")]
    return sum(path.read_bytes().count(b"\n") for path in files)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_to_its_budget(room):
    assert lines_of(room) <= ROOMS[room]


def test_the_package_keeps_to_its_budget():
    assert sum(lines_of(room) for room in ROOMS) <= MOST


def test_every_folder_belongs_to_a_room():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert folders == {folder for room in ROOMS for folder in room.split()} - {"root"}
