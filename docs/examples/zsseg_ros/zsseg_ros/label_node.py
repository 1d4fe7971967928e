"""A ROS 2 node: images in, labels and overlays out, classes renamed while it runs.

See docs/ros2.md. It needs a ROS 2 environment (rclpy and messages) that also finds zsseg_rt.
"""

from __future__ import annotations

import array
import json
import sys

import cv2
import numpy as np
import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from zsseg_rt import Bundle, Engine, ZssegError

# The QoS of sensor data with a queue of one: the newest image is labelled, older ones are dropped.
NEWEST = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.BEST_EFFORT
)
# Kept for subscribers that come later.
LATCHED = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
RELIABLE = QoSProfile(
    history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.RELIABLE
)
ENCODINGS = ("rgb8", "bgr8")
FIXED = ("bundle", "transport")


class LabelNode(Node):
    """Labels the images of a topic.

    Parameters: ``bundle``, a bundle folder (empty: the photo demo's); ``transport``, ``"raw"`` or
    ``"compressed"``; ``classes`` and ``background``, names separated by commas, which may be set
    while the node runs.
    """

    def __init__(self) -> None:
        super().__init__("zsseg")
        folder = self.declare_parameter("bundle", "").value
        transport = self.declare_parameter("transport", "raw").value
        classes = self.declare_parameter("classes", "person, dog, car, chair").value
        background = self.declare_parameter("background", "").value
        if transport not in ("raw", "compressed"):
            raise ValueError(f"transport: expected raw or compressed, got {transport!r}")
        self.engine = Engine(folder or Bundle.demo("photos"))
        self.labels = self.create_publisher(Image, "labels", NEWEST)
        self.overlay = self.create_publisher(Image, "overlay", NEWEST)
        self.vocabulary = self.create_publisher(String, "vocabulary", LATCHED)
        self.name_classes(classes, background)
        self.add_on_set_parameters_callback(self.on_parameters)
        self.create_subscription(String, "classes", self.on_classes, RELIABLE)
        if transport == "compressed":
            self.create_subscription(CompressedImage, "image/compressed", self.on_image, NEWEST)
        else:
            self.create_subscription(Image, "image", self.on_image, NEWEST)

    def on_image(self, message: Image | CompressedImage) -> None:
        """Label an image; one that cannot be labelled is logged and left out."""
        try:
            frame = to_frame(message)
            seg = self.engine.segment(frame)
        except (ValueError, ZssegError) as error:
            self.get_logger().error(str(error), throttle_duration_sec=5.0)
            return
        self.labels.publish(to_message(seg.labels, message))
        if self.overlay.get_subscription_count():
            self.overlay.publish(to_message(seg.overlay(frame), message))

    def on_classes(self, message: String) -> None:
        """Set the parameter ``classes``; what the bundle does not know is logged."""
        result = self.set_parameters([Parameter("classes", value=message.data)])[0]
        if not result.successful:
            self.get_logger().error(result.reason)

    def on_parameters(self, parameters: list) -> SetParametersResult:
        """Rename the classes; names that the bundle does not know are refused."""
        wanted = {parameter.name: parameter.value for parameter in parameters}
        for name in FIXED:
            if name in wanted:
                reason = f"{name}: cannot change while the node runs. Start it again."
                return SetParametersResult(successful=False, reason=reason)
        if wanted.keys() & {"classes", "background"}:
            texts = [
                wanted.get(name, self.get_parameter(name).value)
                for name in ("classes", "background")
            ]
            try:
                self.name_classes(*texts)
            except ZssegError as error:  # the old classes stay
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def name_classes(self, classes: str, background: str) -> None:
        """Use these names from the next image on, and publish them."""
        phrases = split(background) or None
        if background.strip() in ("auto", "none"):
            phrases = background.strip()
        self.engine.set_classes(split(classes), background=phrases)
        names = list(self.engine.vocabulary.names)
        content = {"names": names, "unknown": 255 if len(names) <= 254 else 65535}
        self.vocabulary.publish(String(data=json.dumps(content, ensure_ascii=False)))


def split(text: str) -> list[str]:
    """The names in "a, b"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def to_frame(message: Image | CompressedImage) -> np.ndarray:
    """An image message as uint8 [H, W, 3], RGB; rows of a raw one may be padded.

    Raises:
        ValueError: Another encoding, or data that are no picture or too short.
    """
    if isinstance(message, CompressedImage):
        picture = None
        if len(message.data):
            picture = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError(f"data: expected a JPEG or PNG, got format {message.format!r}")
        return np.ascontiguousarray(picture[..., ::-1])
    if message.encoding not in ENCODINGS:
        raise ValueError(f"encoding: expected {' or '.join(ENCODINGS)}, got {message.encoding!r}")
    height, width, step = message.height, message.width, message.step
    if step < 3 * width or len(message.data) < height * step:
        raise ValueError(f"data: expected {height} rows of {step} bytes, got {len(message.data)}")
    rows = np.frombuffer(message.data, np.uint8, height * step).reshape(height, step)
    frame = rows[:, : 3 * width].reshape(height, width, 3)
    return np.ascontiguousarray(frame[..., ::-1] if message.encoding == "bgr8" else frame)


def to_message(pixels: np.ndarray, source: Image | CompressedImage) -> Image:
    """Labels or an RGB picture as a message with the header of the image they were made from."""
    message = Image()
    message.header = source.header
    message.height, message.width = pixels.shape[:2]
    labels = "mono8" if pixels.dtype == np.uint8 else "mono16"
    message.encoding = labels if pixels.ndim == 2 else "rgb8"
    message.is_bigendian = int(sys.byteorder == "big")
    message.step = pixels.nbytes // message.height
    message.data = array.array("B", pixels.tobytes())  # bytes would be checked one by one
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
