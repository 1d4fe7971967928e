"""The ROS 2 package, run against stand-ins for rclpy, launch and messages."""

import array
import ast
import configparser
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from support import ros2_stand_in as ros2
from zsseg_rt import Bundle, Engine, EngineStateError
from zsseg_rt.demo import demo_photos
from zsseg_rt.photos import read_photo

PACKAGE = Path(__file__).parents[2] / "docs" / "examples" / "zsseg_ros"
NODE = PACKAGE / "zsseg_ros" / "label_node.py"
LAUNCH = PACKAGE / "launch" / "label.launch.py"
NAMES = ["yellow brick wall", "grey stone wall", "red tiled floor"]


@pytest.fixture(scope="module")
def frame():
    return read_photo(demo_photos("scenes")[0])


@pytest.fixture(scope="module")
def expected(frame):
    with Engine(Bundle.demo("scenes")) as engine:
        engine.set_classes(NAMES)
        return engine.segment(frame).labels


def run_node(monkeypatch, use, **parameters):
    """Run the example as a program; ``use`` gets the node in the place of ``rclpy.spin``."""
    for name, module in ros2.modules(use).items():
        monkeypatch.setitem(sys.modules, name, module)
    scenes = {"bundle": str(Bundle.demo("scenes").path), "classes": "blue sky"}
    monkeypatch.setattr(ros2.Node, "overrides", scenes | parameters)
    runpy.run_path(str(NODE), run_name="__main__")


def labels_of(message):
    dtype = {"mono8": np.uint8, "mono16": np.uint16}[message.encoding]
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    return rows[:, : message.width * np.dtype(dtype).itemsize].view(dtype)


def images_of(node, topic="labels"):
    return [message for name, message in node.published if name == topic]


def vocabularies_of(node):
    return [json.loads(message.data) for message in images_of(node, "vocabulary")]


def test_labels_come_with_the_images_header(monkeypatch, frame, expected):
    def use(node):
        sent = [
            ros2.image(frame, "rgb8"),
            ros2.image(frame[..., ::-1], "bgr8", padding=5),
        ]
        for message in sent:
            node.callbacks["image"](message)
        assert [topic for topic, _ in node.published] == ["vocabulary", "labels", "labels"]
        for made, message in zip(images_of(node), sent, strict=True):
            assert made.header is message.header
            assert (made.encoding, made.step) == ("mono8", made.width)
            np.testing.assert_array_equal(labels_of(made), expected)
        assert node.errors == []

    run_node(monkeypatch, use, classes=", ".join(NAMES))


def test_many_classes_make_16_bits(monkeypatch, frame):
    words = Bundle.demo("scenes").text.words
    names = [f"{a} {b} {c}" for a in words[:8] for b in words[8:15] for c in words[17:23]][:300]

    def use(node):
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        assert vocabularies_of(node) == [{"names": names, "unknown": 65535}]
        (made,) = images_of(node)
        assert (made.encoding, made.step) == ("mono16", 2 * made.width)
        assert labels_of(made).max() < 300

    run_node(monkeypatch, use, classes=",".join(names))


def test_what_is_no_colour_image_is_left_out(monkeypatch, frame):
    def use(node):
        short = ros2.image(frame, "rgb8")
        short.height += 1
        for message in (ros2.image(frame, "yuv422"), short):
            node.callbacks["image"](message)
        assert images_of(node) == []
        assert [error.partition(":")[0] for error in node.errors] == ["encoding", "data"]
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        assert len(images_of(node)) == 1

    run_node(monkeypatch, use)


def test_classes_change_while_it_runs(monkeypatch, frame, expected):
    def use(node):
        refused = node.set_parameters([ros2.Parameter("classes", value="forklift")])[0]
        assert not refused.successful
        assert "forklift" in refused.reason
        assert node.get_parameter("classes").value == "red ball"
        for fixed in ("bundle", "transport"):
            assert not node.set_parameters([ros2.Parameter(fixed, value="x")])[0].successful
        wanted = ros2.Parameter("classes", value=", ".join(NAMES))
        assert node.set_parameters([wanted])[0].successful
        assert node.set_parameters([ros2.Parameter("use_sim_time", value=True)])[0].successful
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        np.testing.assert_array_equal(labels_of(images_of(node)[0]), expected)
        background = ros2.Parameter("background", value="green box")
        assert node.set_parameters([background])[0].successful
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        assert (labels_of(images_of(node)[1]) == 255).any()

    run_node(monkeypatch, use, classes="red ball")


def test_a_topic_names_classes_too(monkeypatch, frame, expected):
    def use(node):
        node.callbacks["classes"](ros2.String(data="forklift"))
        assert "forklift" in node.errors[0]
        node.callbacks["classes"](ros2.String(data=", ".join(NAMES)))
        assert node.get_parameter("classes").value == ", ".join(NAMES)
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        np.testing.assert_array_equal(labels_of(images_of(node)[0]), expected)
        assert vocabularies_of(node) == [
            {"names": ["red ball"], "unknown": 255},
            {"names": NAMES, "unknown": 255},
        ]
        assert node.profiles["vocabulary"].durability is ros2.DurabilityPolicy.TRANSIENT_LOCAL

    run_node(monkeypatch, use, classes="red ball")


def test_compressed_images_are_decoded(monkeypatch, frame, expected):
    def packed(data):
        header = SimpleNamespace(stamp=(1, 2), frame_id="camera")
        return ros2.CompressedImage(
            header=header, format="bgr8; png compressed bgr8", data=array.array("B", data)
        )

    def use(node):
        assert "image" not in node.callbacks
        message = packed(cv2.imencode(".png", frame[..., ::-1])[1].tobytes())
        for sent in (message, packed(b"no picture"), packed(b"")):
            node.callbacks["image/compressed"](sent)
        (made,) = images_of(node)
        assert made.header is message.header
        np.testing.assert_array_equal(labels_of(made), expected)
        assert [error.partition(":")[0] for error in node.errors] == ["data", "data"]

    run_node(monkeypatch, use, transport="compressed", classes=", ".join(NAMES))
    with pytest.raises(ValueError, match="transport"):
        run_node(monkeypatch, use, transport="zip")


def test_overlays_are_drawn_for_subscribers(monkeypatch, frame):
    def use(node):
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        assert images_of(node, "overlay") == []
        node.watched.add("overlay")
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        (made,) = images_of(node, "overlay")
        assert (made.encoding, made.step) == ("rgb8", 3 * made.width)
        seg = node.engine.segment(frame)
        assert made.data.tobytes() == seg.overlay(frame).tobytes()

    run_node(monkeypatch, use, classes=", ".join(NAMES))


def test_without_parameters_the_photo_demo_runs(monkeypatch):
    def use(node):
        assert len(vocabularies_of(node)[0]["names"]) == 4

    for name, module in ros2.modules(use).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ros2.Node, "overrides", {"background": "auto"})
    runpy.run_path(str(NODE), run_name="__main__")


def test_the_newest_image_counts(monkeypatch):
    def use(node):
        for topic in ("image", "labels"):
            profile = node.profiles[topic]
            assert profile.depth == 1
            assert profile.reliability is ros2.ReliabilityPolicy.BEST_EFFORT

    run_node(monkeypatch, use)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ros2.ExternalShutdownException])
def test_it_ends_without_a_word(monkeypatch, ending):
    nodes = []

    def use(node):
        nodes.append(node)
        raise ending

    run_node(monkeypatch, use)
    assert nodes[0].callbacks == {}
    with pytest.raises(EngineStateError):
        nodes[0].engine.set_classes(NAMES)


# --- the package around the node ---


def test_package_is_described_as_ros_wants_it():
    root = ElementTree.parse(PACKAGE / "package.xml").getroot()
    assert (root.tag, root.get("format")) == ("package", "3")
    required = ["name", "version", "description", "maintainer", "license"]
    assert [child.tag for child in root][:5] == required
    assert "@" in root.find("maintainer").get("email")
    assert root.findtext("export/build_type") == "ament_python"
    needed = {child.text for child in root.findall("exec_depend")}
    imported = set()
    for path in (NODE, LAUNCH):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.partition(".")[0] for name in names}
    by_pip = {"zsseg_rt", "numpy", "cv2"}
    assert imported - set(sys.stdlib_module_names) - by_pip == needed - {"ros2launch"}


def test_what_is_installed_is_there(monkeypatch):
    given = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=given.update))
    runpy.run_path(str(PACKAGE / "setup.py"))
    root = ElementTree.parse(PACKAGE / "package.xml").getroot()
    for tag in ("name", "version", "description", "license", "maintainer"):
        assert given[tag] == root.findtext(tag), tag
    assert given["maintainer_email"] == root.find("maintainer").get("email")
    files = dict(given["data_files"])
    assert files.keys() == {
        "share/ament_index/resource_index/packages", "share/zsseg_ros", "share/zsseg_ros/launch",
    }  # fmt: skip
    for (source,) in files.values():
        assert (PACKAGE / source).is_file(), source
    (script,) = given["entry_points"]["console_scripts"]
    module, _, function = script.partition(" = ")[2].partition(":")
    assert (PACKAGE / module.replace(".", "/")).with_suffix(".py") == NODE
    assert f"def {function}()" in NODE.read_text()
    config = configparser.ConfigParser()
    config.read(PACKAGE / "setup.cfg")
    assert config["install"]["install_scripts"] == "$base/lib/zsseg_ros"


def test_launch_file_passes_every_argument(monkeypatch):
    for name, module in ros2.launch_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    made = runpy.run_path(str(LAUNCH))["generate_launch_description"]().given[0]
    *arguments, node = made
    declared = [argument.given[0] for argument in arguments]
    assert node.kind == "Node"
    assert node.executable == "label_node"
    (parameters,) = node.parameters
    assert {"image", "namespace", *parameters} == set(declared)
    assert {value.value_type for value in parameters.values()} == {str}
    assert [value.given[0].given[0] for value in parameters.values()] == list(parameters)
    node_parameters = {"bundle", "transport", "classes", "background"}
    assert set(parameters) == node_parameters
    assert [topic for topic, _ in node.remappings] == ["image", "image/compressed"]
