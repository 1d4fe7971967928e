"""The ROS 2 example node, run against stand-ins for rclpy and its messages."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from support import ros2_stand_in as ros2
from zsseg_rt import Bundle, Engine, EngineStateError
from zsseg_rt.demo import demo_photos
from zsseg_rt.photos import read_photo

NODE = Path(__file__).parents[2] / "docs" / "examples" / "ros2_node.py"
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
    monkeypatch.setattr(ros2.Node, "overrides", parameters)
    runpy.run_path(str(NODE), run_name="__main__")


def labels_of(message):
    dtype = {"mono8": np.uint8, "mono16": np.uint16}[message.encoding]
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    return rows[:, : message.width * np.dtype(dtype).itemsize].view(dtype)


def test_labels_come_with_the_images_header(monkeypatch, frame, expected):
    def use(node):
        sent = [
            ros2.image(frame, "rgb8"),
            ros2.image(frame[..., ::-1], "bgr8", padding=5),
        ]
        for message in sent:
            node.callbacks["image"](message)
        assert [topic for topic, _ in node.published] == ["labels", "labels"]
        for (_, made), message in zip(node.published, sent, strict=True):
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
        made = node.published[0][1]
        assert (made.encoding, made.step) == ("mono16", 2 * made.width)
        assert labels_of(made).max() < 300

    run_node(monkeypatch, use, classes=",".join(names))


def test_what_is_no_colour_image_is_left_out(monkeypatch, frame):
    def use(node):
        short = ros2.image(frame, "rgb8")
        short.height += 1
        for message in (ros2.image(frame, "yuv422"), short):
            node.callbacks["image"](message)
        assert node.published == []
        assert "expected rgb8 or bgr8, got 'yuv422'" in node.errors[0]
        assert "rows of" in node.errors[1]
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        assert len(node.published) == 1

    run_node(monkeypatch, use)


def test_classes_change_while_it_runs(monkeypatch, frame, expected):
    def use(node):
        refused = node.set_parameters([ros2.Parameter("classes", "forklift")])[0]
        assert not refused.successful
        assert "forklift" in refused.reason
        assert node.get_parameter("classes").value == "red ball"
        assert not node.set_parameters([ros2.Parameter("bundle", "x")])[0].successful
        assert node.set_parameters([ros2.Parameter("classes", ", ".join(NAMES))])[0].successful
        assert node.set_parameters([ros2.Parameter("use_sim_time", True)])[0].successful
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        np.testing.assert_array_equal(labels_of(node.published[0][1]), expected)
        assert node.set_parameters([ros2.Parameter("background", "green box")])[0].successful
        node.callbacks["image"](ros2.image(frame, "rgb8"))
        assert (labels_of(node.published[1][1]) == 255).any()

    run_node(monkeypatch, use, classes="red ball")


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
