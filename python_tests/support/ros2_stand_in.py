"""Stands for rclpy, launch and the messages that the ROS 2 package uses, without any transport.

Names and signatures are those of rclpy (Jazzy); values are checked as the real messages check
them: a uint8 sequence is an ``array.array("B")``, sizes are integers in range, texts are ``str``.
"""

from __future__ import annotations

import array
import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar


class ExternalShutdownException(Exception):  # noqa: N818 - rclpy's name
    """What ``rclpy.spin`` raises when something else ended ROS."""


class HistoryPolicy(Enum):
    KEEP_LAST = 1


class ReliabilityPolicy(Enum):
    RELIABLE = 1
    BEST_EFFORT = 2


class DurabilityPolicy(Enum):
    TRANSIENT_LOCAL = 1
    VOLATILE = 2


@dataclass(frozen=True, kw_only=True)
class QoSProfile:
    history: HistoryPolicy
    depth: int
    reliability: ReliabilityPolicy
    durability: DurabilityPolicy = DurabilityPolicy.VOLATILE


class Message:
    """Fields of given kinds, which start empty."""

    _KINDS: ClassVar[dict[str, type]] = {}

    def __init__(self, **fields: Any) -> None:
        empty = {
            SimpleNamespace: SimpleNamespace(stamp=None, frame_id=""),
            array.array: array.array("B"),
        }
        for name, kind in self._KINDS.items():
            setattr(
                self,
                name,
                fields.pop(name, empty.get(kind, kind() if kind in (int, str) else None)),
            )
        assert not fields

    def __setattr__(self, name: str, value: Any) -> None:
        assert isinstance(value, self._KINDS[name]), f"{name}: {type(value).__name__}"
        if isinstance(value, int):
            assert 0 <= value < (256 if name == "is_bigendian" else 2**32)
        if name == "data":
            assert not isinstance(value, array.array) or value.typecode == "B"
        super().__setattr__(name, value)


class Image(Message):
    """``sensor_msgs/msg/Image``."""

    _KINDS: ClassVar = {
        "header": SimpleNamespace, "height": int, "width": int, "encoding": str,
        "is_bigendian": int, "step": int, "data": array.array,
    }  # fmt: skip


class CompressedImage(Message):
    """``sensor_msgs/msg/CompressedImage``."""

    _KINDS: ClassVar = {"header": SimpleNamespace, "format": str, "data": array.array}


class String(Message):
    """``std_msgs/msg/String``."""

    _KINDS: ClassVar = {"data": str}


@dataclass(frozen=True, kw_only=True)
class SetParametersResult:
    successful: bool
    reason: str = ""


class Parameter:
    """``rclpy.parameter.Parameter``, of whose arguments the second is a type."""

    def __init__(self, name: str, type_: None = None, value: Any = None) -> None:
        assert type_ is None
        self.name, self.value = name, value


class Node:
    """``rclpy.node.Node``; ``overrides`` are the parameters of the command line."""

    overrides: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, node_name: str) -> None:
        self.name, self.published, self.errors = node_name, [], []
        self.watched = {"labels", "vocabulary"}
        self.callbacks, self.profiles, self._check = {}, {}, None
        self._parameters: dict[str, Parameter] = {}

    def declare_parameter(self, name: str, value: Any) -> Parameter:
        assert name not in self._parameters
        chosen = self.overrides.get(name, value)
        assert type(chosen) is type(value)
        self._parameters[name] = Parameter(name, value=chosen)
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
        self.profiles[topic] = qos_profile

        def publish(message: Message) -> None:
            assert type(message) is msg_type
            self.published.append((topic, message))

        return SimpleNamespace(
            publish=publish, get_subscription_count=lambda: int(topic in self.watched)
        )

    def create_subscription(
        self, msg_type: type, topic: str, callback: Any, qos_profile: QoSProfile
    ) -> None:
        def checked(message: Message) -> None:
            assert type(message) is msg_type
            callback(message)

        self.profiles[topic], self.callbacks[topic] = qos_profile, checked

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
        "rclpy.parameter": module("rclpy.parameter", Parameter=Parameter),
        "rclpy.qos": module(
            "rclpy.qos",
            DurabilityPolicy=DurabilityPolicy,
            HistoryPolicy=HistoryPolicy,
            QoSProfile=QoSProfile,
            ReliabilityPolicy=ReliabilityPolicy,
        ),
        "rcl_interfaces": module("rcl_interfaces"),
        "rcl_interfaces.msg": module("rcl_interfaces.msg", SetParametersResult=SetParametersResult),
        "sensor_msgs": module("sensor_msgs"),
        "sensor_msgs.msg": module("sensor_msgs.msg", CompressedImage=CompressedImage, Image=Image),
        "std_msgs": module("std_msgs"),
        "std_msgs.msg": module("std_msgs.msg", String=String),
    }


def launch_modules() -> dict[str, ModuleType]:
    """What a launch file imports; what it makes keeps its arguments."""

    def module(name: str, *makers: str) -> ModuleType:
        made = ModuleType(name)
        for maker in makers:
            keep = lambda *given, _kind=maker, **named: SimpleNamespace(  # noqa: E731
                kind=_kind, given=given, **named
            )
            setattr(made, maker, keep)
        return made

    made = [
        module("launch", "LaunchDescription"),
        module("launch.actions", "DeclareLaunchArgument"),
        module("launch.substitutions", "LaunchConfiguration"),
        module("launch_ros"),
        module("launch_ros.actions", "Node"),
        module("launch_ros.parameter_descriptions", "ParameterValue"),
    ]
    return {module.__name__: module for module in made}


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
