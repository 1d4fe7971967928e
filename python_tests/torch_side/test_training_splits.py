"""The package's class lists against the reference data beside the project."""

import json

import pytest

from zsseg_rt.evaluation.datasets import create_dataset
from zsseg_rt.evaluation.datasets.published import PUBLISHED, class_table

TABLES = (
    "ade20k",
    "ade20k_full",
    "camvid",
    "cityscapes",
    "cocostuff164k",
    "pascal_context",
    "voc2012",
)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_consistent(name):
    table = class_table(name)
    assert len(set(table.names)) == len(table.names) == len(set(table.values))
    assert sorted(table.seen + table.unseen) == list(range(len(table.names)))
    assert all(text == text.strip() and text for text in table.names)
    if table.map_values is not None:
        assert len(set(table.map_values)) == len(table.names)


@pytest.fixture(scope="module")
def splits(shared_dir):
    return json.loads((shared_dir / "specs" / "splits.json").read_text())


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("key", "name"), [("voc12_20", "voc2012"), ("cocostuff164k_171", "cocostuff164k")]
)
def test_published_splits(splits, key, name):
    expected, table = splits[key], class_table(name)
    assert list(table.names) == expected["classes"]
    assert list(table.seen) == expected["seen"]
    assert list(table.unseen) == expected["unseen"]
    assert list(table.values) == [
        i + expected["reduce_zero_label"] for i in range(len(table.names))
    ]


@pytest.mark.needs_shared
@pytest.mark.parametrize("classes", [59, 60])
def test_context_splits(splits, classes):
    expected, table = splits[f"pascal_context_{classes}"], class_table("pascal_context")
    if classes == 59:
        table = table.pick(range(1, 60))
    assert list(table.names) == expected["classes"]
    assert list(table.seen) == expected["seen"]
    assert list(table.unseen) == expected["unseen"]


@pytest.mark.needs_shared
def test_ade20k_full_list(shared_dir):
    expected = json.loads((shared_dir / "specs" / "ade20k_full_847.json").read_text())
    table = class_table("ade20k_full")
    assert list(table.names) == [entry["name"] for entry in expected]
    assert list(table.map_values) == [entry["id"] for entry in expected]
    assert list(table.values) == [entry["trainId"] for entry in expected]
    rare = [entry["trainId"] for entry in expected if entry["image_count"] <= 10]
    assert list(table.unseen) == rare


@pytest.mark.needs_shared
def test_zegformer_order_of_cocostuff(shared_dir):
    expected = json.loads((shared_dir / "specs" / "cocostuff_171_zegformer_order.json").read_text())
    table = PUBLISHED["cocostuff164k"].zegformer(class_table("cocostuff164k"))
    assert list(table.names) == [entry["name"] for entry in expected]
    assert list(table.map_values) == [entry["id"] for entry in expected]
    assert list(table.seen) == [entry["trainId"] for entry in expected if entry["seen"]]


@pytest.mark.needs_shared
def test_real_camvid_holds_every_class(shared_dir):
    names = json.loads((shared_dir / "data" / "camvid" / "classes.json").read_text())
    dataset = create_dataset("camvid", shared_dir / "data" / "camvid", "val")
    for ours, theirs in zip(dataset.class_names, names[:11], strict=True):
        assert set(ours.split(", ")) == set(theirs.rstrip(")").split(" (")) or ours == theirs
    report = dataset.verify()
    assert (report.num_pictures, report.problems, report.absent) == (101, (), ())


@pytest.mark.needs_shared
def test_real_photos_with_instance_masks(shared_dir):
    root = shared_dir / "data" / "tinycoco"
    index = json.loads((root / "index.json").read_text())
    dataset = create_dataset("folder", root, "all", class_names=index["names"])
    assert dataset.verify().problems == ()
    classes = {entry["file"].split(".")[0]: entry["classes"] for entry in index["images"]}
    for number in range(0, len(dataset), 5):
        sample = dataset[number]
        present = {dataset.class_names[value] for value in set(sample.labels.ravel().tolist())}
        assert present - {"background"} <= set(classes[sample.name])
