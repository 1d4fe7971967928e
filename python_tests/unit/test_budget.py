"""How many lines each room of the package may have.

A number only falls, or rises by what another gives up in the same commit. Counted are lines of
``.py`` files, as ``find zsseg_rt -name '*.py' | xargs cat | wc -l`` does.
"""

from pathlib import Path

import pytest

import zsseg_rt

PACKAGE = Path(zsseg_rt.__file__).parent
MOST = 66_920  # the whole package; below the rooms' sum, so that not all of them may be full
ROOMS = {
    "root": 1_275,
    "common": 1_865,
    "ops": 1_730,
    "backends": 7_820,
    "runtime": 5_630,
    "text": 1_870,
    "bundles demo fetch": 2_030,
    "results": 1_420,
    "photos": 660,
    "stream": 6_250,
    "server": 2_480,
    "profiling": 3_820,
    "evaluation": 2_100,
    "cli": 3_670,
    "integrations": 950,
    "models": 7_580,
    "export": 5_865,
    "networks": 930,
    "onnx": 985,
    "training": 6_240,
    "torch_files": 2_140,
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
