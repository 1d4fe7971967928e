"""One reader for every list of class names: what a line may be, and which id it has."""

import json
import logging

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt.cli.options import read_background, read_classes
from zsseg_rt.errors import DatasetError, SourceError
from zsseg_rt.text.name_lists import read_name_list

CVAT = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:255,0,0::\nroad:128,64,128::\n"


def listed(tmp_path, content, *, with_ids=True):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "names.txt").write_bytes(data)
    return read_name_list(tmp_path / "names.txt", DatasetError, with_ids=with_ids)


@pytest.mark.parametrize(
    ("content", "names", "ids"),
    [
        ("road\ncar\n", ("road", "car"), (0, 1)),
        ("\ufeffroad \r\n car\r\n\r\n\n", ("road", "car"), (0, 1)),
        ("road\rcar", ("road", "car"), (0, 1)),
        ("road\ncar\n".encode("utf-16"), ("road", "car"), (0, 1)),
        ("0 person\n1 car", ("person", "car"), (0, 1)),
        ("1: person\n2: car", ("person", "car"), (1, 2)),
        ("0,person\n3,dog, hound", ("person", "dog, hound"), (0, 3)),
        ("7\troad\n\n# walk\n8\tsidewalk", ("road", "sidewalk"), (7, 8)),
        ("3d printer\n2 wheeler\ncar", ("3d printer", "2 wheeler", "car"), (0, 1, 2)),
        ("road # grey\ncar", ("road", "car"), (0, 1)),
        ("road [unseen]\ncar", ("road", "car"), (0, 1)),
        ("__ignore__\n_background_\ncar\nroad", ("car", "road"), (1, 2)),
        ("_background_\ncar", ("car",), (1,)),
        ("background\ncar", ("background", "car"), (0, 1)),
        ("car\nVoid\nroad", ("car", "road"), (0, 2)),
        (CVAT, ("car", "road"), (1, 2)),
        (json.dumps(["road", ["car", "auto"]]), ("road", "car, auto"), (0, 1)),
    ],
)
def test_a_class_s_id_is_its_line_or_its_number(content, names, ids, tmp_path):
    found = listed(tmp_path, content)
    assert (found.names, found.ids) == (names, ids)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("road\n\ncar", "2"),
        ("# mine\nroad\ncar", "1"),
        ("road\n   \ncar", "2"),
        ("0 road\n1 car\ntree", "3"),
        ("id,name\n0,road\n1,car", "1"),
        ("", "one"),
        (b"stra\xdfe", "4"),
        ("[1", "JSON"),
    ],
)
def test_what_is_no_class_is_refused_with_its_line(content, line, tmp_path):
    with refused(DatasetError, None) as error:
        listed(tmp_path, content)
    assert f"names.txt: line {line}" in str(error.value) or line in str(error.value)


def test_without_ids_empty_lines_and_comments_are_skipped(tmp_path, caplog):
    (tmp_path / "names.txt").write_text(
        "\ufeff# mine\n\n0: road, street\n1: car [unseen]\n2: void\n"
    )
    with caplog.at_level(logging.WARNING):
        given = f"@{tmp_path / 'names.txt'}"
        assert read_classes(given, []) == [["road", "street"], "car"]
    assert "void" in caplog.text
    assert read_background(given, 2) == ["road", "street", "car"]
    with refused(SourceError, None, "none.txt"):
        read_classes(f"@{tmp_path / 'none.txt'}", [])


def test_lines_end_where_every_other_program_ends_them(tmp_path):
    assert listed(tmp_path, "road\u2028car\ntree").ids == (0, 1)


def test_a_table_has_a_row_for_every_line(tmp_path):
    rows = np.arange(3, dtype=np.float32)[:, None]
    assert listed(tmp_path, "car\nvoid\nroad").pick(rows).ravel().tolist() == [0, 2]
    assert listed(tmp_path, "__ignore__\ncar\nroad").pick(rows).ravel().tolist() == [1, 2]
    assert listed(tmp_path, "1 car\n2 road\n3 tree").pick(rows).ravel().tolist() == [0, 1, 2]
    for content in ("car\nroad", "0 car\n1 road\n7 tree"):
        with pytest.raises(ValueError, match="rows"):
            listed(tmp_path, content).pick(rows)
