"""How many lines each room of the package may have.

A number only falls, or rises by what another gives up in the same commit. Counted are lines of
``.py`` files, as ``find zsseg_rt -name '*.py' | xargs cat | wc -l`` does.
"""

from pathlib import Path

import pytest

import zsseg_rt

PACKAGE = Path(zsseg_rt.__file__).parent
MOST = 49_960  # the whole package; below the rooms' sum, so that not all of them may be full
ROOMS = {
    "root": 1_255,
    "common": 1_565,
    "ops": 1_300,
    "backends": 2_935,
    "runtime": 4_450,
    "text": 1_430,
    "bundles demo fetch": 1_520,
    "results": 1_145,
    "photos": 500,
    "stream": 4_555,
    "server": 1_855,
    "profiling": 2_375,
    "evaluation": 1_450,
    "cli": 2_865,
    "integrations": 795,
    "models": 4_805,
    "export": 3_425,
    "networks": 2_360,
    "onnx": 3_245,
    "training": 4_120,
    "torch_files": 2_060,
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
