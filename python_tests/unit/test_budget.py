"""How many lines each room of the package may have.

A number only falls, or rises by what another gives up in the same commit. Counted are lines of
``.py`` files, as ``find zsseg_rt -name '*.py' | xargs cat | wc -l`` does.
"""

from pathlib import Path

import pytest

import zsseg_rt

PACKAGE = Path(zsseg_rt.__file__).parent
MOST = 61_740  # the whole package; below the rooms' sum, so that not all of them may be full
ROOMS = {
    "root": 1_250,
    "common": 1_765,
    "ops": 1_565,
    "backends": 3_875,
    "runtime": 5_400,
    "text": 1_775,
    "bundles demo fetch": 1_940,
    "results": 1_370,
    "photos": 630,
    "stream": 6_185,
    "server": 2_330,
    "profiling": 3_125,
    "evaluation": 1_790,
    "cli": 3_490,
    "integrations": 855,
    "models": 6_020,
    "export": 4_140,
    "networks": 2_615,
    "onnx": 3_990,
    "training": 5_150,
    "torch_files": 2_520,
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
