"""How many lines each room of the package may have.

A number only falls, or rises by what another gives up in the same commit. Counted are lines of
``.py`` files, as ``find zsseg_rt -name '*.py' | xargs cat | wc -l`` does.
"""

from pathlib import Path

import pytest

import zsseg_rt

PACKAGE = Path(zsseg_rt.__file__).parent
MOST = 53_430  # the whole package; below the rooms' sum, so that not all of them may be full
ROOMS = {
    "root": 1_185,
    "common": 1_580,
    "ops": 1_530,
    "backends": 3_250,
    "runtime": 4_850,
    "text": 1_495,
    "bundles demo fetch": 1_540,
    "results": 1_185,
    "photos": 520,
    "stream": 5_080,
    "server": 1_980,
    "profiling": 2_510,
    "evaluation": 1_590,
    "cli": 3_180,
    "integrations": 795,
    "models": 5_140,
    "export": 3_730,
    "networks": 2_385,
    "onnx": 3_410,
    "training": 4_370,
    "torch_files": 2_155,
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
