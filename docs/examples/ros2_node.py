"""A ROS 2 node: images in, label images out, classes renamed while it runs; see docs/ros2.md.

It needs a ROS 2 environment (rclpy, sensor_msgs, rcl_interfaces) that also finds zsseg_rt.
"""

from __future__ import annotations

import array
import sys

import numpy as np
import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from zsseg_rt import Bundle, Engine, ZssegError

# The QoS of sensor data with a queue of one: the newest image is labelled, older ones are dropped.
NEWEST = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.BEST_EFFORT
)
ENCODINGS = ("rgb8", "bgr8")


class LabelNode(Node):
    """Labels the images of a topic.

    Parameters: ``bundle``, a bundle folder (empty: the demo's); ``classes`` and ``background``,
    names with commas between them, which may be set while the node runs.
    """

    def __init__(self) -> None:
        super().__init__("zsseg")
        folder = self.declare_parameter("bundle", "").value
        classes = self.declare_parameter("classes", "wall, floor, ball, box").value
        background = self.declare_parameter("background", "").value
        self.engine = Engine(folder or Bundle.demo())
        self.engine.set_classes(split(classes), background=split(background))
        self.add_on_set_parameters_callback(self.on_parameters)
        self.labels = self.create_publisher(Image, "labels", NEWEST)
        self.create_subscription(Image, "image", self.on_image, NEWEST)

    def on_image(self, message: Image) -> None:
        """Label an image; one that cannot be labelled is told and left out."""
        try:
            seg = self.engine.segment(to_frame(message))
        except (ValueError, ZssegError) as error:
            self.get_logger().error(str(error), throttle_duration_sec=5.0)
            return
        self.labels.publish(to_message(seg.labels, message))

    def on_parameters(self, parameters: list) -> SetParametersResult:
        """Rename the classes; names that the bundle does not know are refused."""
        wanted = {parameter.name: parameter.value for parameter in parameters}
        if "bundle" in wanted:
            return SetParametersResult(successful=False, reason="bundle: cannot change; start anew")
        if wanted.keys() & {"classes", "background"}:
            texts = [
                wanted.get(name, self.get_parameter(name).value)
                for name in ("classes", "background")
            ]
            try:
                self.engine.set_classes(split(texts[0]), background=split(texts[1]))
            except ZssegError as error:  # the old classes stay
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)


def split(text: str) -> list[str]:
    """The names in "a, b"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def to_frame(message: Image) -> np.ndarray:
    """An image message as uint8 [H, W, 3], RGB; its rows may be padded.

    Raises:
        ValueError: Another encoding, or less data than the header says.
    """
    if message.encoding not in ENCODINGS:
        raise ValueError(f"encoding: expected {' or '.join(ENCODINGS)}, got {message.encoding!r}")
    height, width, step = message.height, message.width, message.step
    if step < 3 * width or len(message.data) < height * step:
        raise ValueError(f"data: expected {height} rows of {step} bytes, got {len(message.data)}")
    rows = np.frombuffer(message.data, np.uint8, height * step).reshape(height, step)
    frame = rows[:, : 3 * width].reshape(height, width, 3)
    return np.ascontiguousarray(frame[..., ::-1] if message.encoding == "bgr8" else frame)


def to_message(labels: np.ndarray, source: Image) -> Image:
    """Labels as an image message with the header of the image they were made from."""
    message = Image()
    message.header = source.header
    message.height, message.width = labels.shape
    message.encoding = "mono8" if labels.dtype == np.uint8 else "mono16"
    message.is_bigendian = int(sys.byteorder == "big")
    message.step = message.width * labels.itemsize
    message.data = array.array("B", labels.tobytes())  # bytes would be checked one by one
    return message


def main() -> None:
    """Run the node until it is interrupted."""
    rclpy.init()
    node = LabelNode()
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.engine.close()
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
