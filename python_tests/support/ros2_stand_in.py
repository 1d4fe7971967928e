"""Stands for rclpy and the messages that the example node uses, without any transport.

Names and signatures are those of rclpy (Jazzy); values are checked as the real messages check
them: a uint8 sequence is an ``array.array("B")``, sizes are integers in range, texts are ``str``.
"""

from __future__ import annotations

import array
import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any


class ExternalShutdownException(Exception):  # noqa: N818 - rclpy's name
    """What ``rclpy.spin`` raises when something else ended ROS."""


class HistoryPolicy(Enum):
    KEEP_LAST = 1


class ReliabilityPolicy(Enum):
    RELIABLE = 1
    BEST_EFFORT = 2


@dataclass(frozen=True, kw_only=True)
class QoSProfile:
    history: HistoryPolicy
    depth: int
    reliability: ReliabilityPolicy


class Image:
    """``sensor_msgs/msg/Image``."""

    _KINDS = {  # noqa: RUF012
        "header": SimpleNamespace, "height": int, "width": int, "encoding": str,
        "is_bigendian": int, "step": int, "data": array.array,
    }  # fmt: skip

    def __init__(self) -> None:
        self.header = SimpleNamespace(stamp=None, frame_id="")
        self.height = self.width = self.is_bigendian = self.step = 0
        self.encoding, self.data = "", array.array("B")

    def __setattr__(self, name: str, value: Any) -> None:
        assert isinstance(value, self._KINDS[name]), f"{name}: {type(value).__name__}"
        if isinstance(value, int):
            assert 0 <= value < (256 if name == "is_bigendian" else 2**32)
        if name == "data":
            assert value.typecode == "B"
        super().__setattr__(name, value)


@dataclass(frozen=True, kw_only=True)
class SetParametersResult:
    successful: bool
    reason: str = ""


@dataclass(frozen=True)
class Parameter:
    name: str
    value: Any


class Node:
    """``rclpy.node.Node``; ``overrides`` are the parameters of the command line."""

    overrides: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, node_name: str) -> None:
        self.name, self.published, self.errors = node_name, [], []
        self.callbacks, self.profiles, self._check = {}, {}, None
        self._parameters: dict[str, Parameter] = {}

    def declare_parameter(self, name: str, value: Any) -> Parameter:
        assert name not in self._parameters
        chosen = self.overrides.get(name, value)
        assert type(chosen) is type(value)
        self._parameters[name] = Parameter(name, chosen)
        return self._parameters[name]

    def get_parameter(self, name: str) -> Parameter:
        return self._parameters[name]

    def set_parameters(self, parameters: list[Parameter]) -> list[SetParametersResult]:
        results = []
        for parameter in parameters:
            result = self._check([parameter])
            if result.successful:
                self._parameters[parameter.name] = parameter
            results.append(result)
        return results

    def add_on_set_parameters_callback(self, callback: Any) -> None:
        self._check = callback

    def create_publisher(self, msg_type: type, topic: str, qos_profile: QoSProfile) -> Any:
        assert msg_type is Image
        self.profiles[topic] = qos_profile
        return SimpleNamespace(publish=lambda message: self.published.append((topic, message)))

    def create_subscription(
        self, msg_type: type, topic: str, callback: Any, qos_profile: QoSProfile
    ) -> None:
        assert msg_type is Image
        self.profiles[topic], self.callbacks[topic] = qos_profile, callback

    def get_logger(self) -> Any:
        def error(message: str, *, throttle_duration_sec: float = 0.0) -> None:
            assert isinstance(throttle_duration_sec, float)
            self.errors.append(message)

        return SimpleNamespace(error=error)

    def destroy_node(self) -> None:
        self.callbacks.clear()


def modules(spin: Any) -> dict[str, ModuleType]:
    """What stands in ``sys.modules``; ``spin`` is given the node by ``rclpy.spin``."""

    def module(name: str, **content: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(content)
        return made

    nothing = lambda: None  # noqa: E731
    return {
        "rclpy": module("rclpy", init=nothing, spin=spin, try_shutdown=nothing),
        "rclpy.executors": module(
            "rclpy.executors", ExternalShutdownException=ExternalShutdownException
        ),
        "rclpy.node": module("rclpy.node", Node=Node),
        "rclpy.qos": module(
            "rclpy.qos",
            HistoryPolicy=HistoryPolicy,
            QoSProfile=QoSProfile,
            ReliabilityPolicy=ReliabilityPolicy,
        ),
        "rcl_interfaces": module("rcl_interfaces"),
        "rcl_interfaces.msg": module("rcl_interfaces.msg", SetParametersResult=SetParametersResult),
        "sensor_msgs": module("sensor_msgs"),
        "sensor_msgs.msg": module("sensor_msgs.msg", Image=Image),
    }


def image(pixels: Any, encoding: str, *, padding: int = 0) -> Image:
    """A message that holds uint8 [H, W, 3]."""
    message = Image()
    message.header = SimpleNamespace(stamp=(12, 34), frame_id="camera")
    message.height, message.width = pixels.shape[:2]
    message.encoding, message.is_bigendian = encoding, int(sys.byteorder == "big")
    message.step = 3 * message.width + padding
    rows = (row.tobytes() + b"\xaa" * padding for row in pixels)
    message.data = array.array("B", b"".join(rows))
    return message
