"""One rule for classes on the command line: where commas part synonyms, and where classes."""

import json

import pytest

from support.command_line import run
from zsseg_rt.cli.options import flat_names, read_classes
from zsseg_rt.demo import demo_photos
from zsseg_rt.evaluation.datasets.published import class_table


@pytest.mark.parametrize(
    ("classes", "single", "names"),
    [
        ("road, car", [], ["road", "car"]),
        ("road; sofa, couch", [], ["road", ["sofa", "couch"]]),
        ("sofa, couch;", [], [["sofa", "couch"]]),
        (None, ["sofa, couch", "road"], [["sofa", "couch"], "road"]),
        ("road", ["sofa,couch"], ["road", ["sofa", "couch"]]),
    ],
)
def test_commas_and_semicolons(classes, single, names):
    assert read_classes(classes, single) == names


def test_a_file_and_the_option_class_read_a_class_alike(tmp_path):
    lines = ["sofa, couch", "road"]
    (tmp_path / "names.txt").write_text("\n".join(lines))
    assert read_classes(f"@{tmp_path / 'names.txt'}", []) == read_classes(None, lines)


def test_synonyms_in_an_option_are_remarked_upon(tmp_path, capsys):
    report = tmp_path / "r.json"
    call = (
        "segment",
        demo_photos("scenes")[0],
        "--demo",
        "scenes",
        "--class",
        "ball, blue ball",
        "-o",
        tmp_path,
    )
    assert run(*call, "--json", report) == 0
    assert "--class 'ball, blue ball': one class, 'ball', also called blue ball" in (
        capsys.readouterr().err
    )
    assert json.loads(report.read_text())["engine"]["names"] == ["ball"]


@pytest.mark.parametrize("given", ["pavement, sidewalk", "pavement, sidewalk;", "sidewalk"])
def test_a_data_set_s_class_with_a_comma_can_be_named(given):
    table = class_table("camvid").with_unseen(flat_names(given))
    assert [table.names[index] for index in table.unseen] == ["pavement, sidewalk"]
