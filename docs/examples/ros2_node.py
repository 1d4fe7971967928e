"""A ROS 2 node: images in, labels out, classes renamed while it runs. Not tried in ROS 2.

    python ros2_node.py --ros-args -r image:=/camera/image_raw -p classes:="road, person"

Needs an environment that finds rclpy and zsseg_rt. Topics: ``image`` (rgb8 or bgr8), ``labels``
(mono8, with the image's header; 255 is unknown), ``vocabulary`` (JSON, kept for late subscribers).
Parameters: ``bundle`` (a folder; empty: the photo demo's) and ``classes``, which may be set while
it runs: ``ros2 param set /zsseg classes "road, bicycle"``.
"""

import array
import json
from argparse import ArgumentParser

ArgumentParser(description=__doc__).parse_known_args()  # --help works without ROS

import numpy as np
import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import String

from zsseg_rt import Bundle, Engine, ZssegError

NEWEST = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)  # older images are dropped
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)


class LabelNode(Node):
    """Labels the images of a topic."""

    def __init__(self) -> None:
        super().__init__("zsseg")
        folder = self.declare_parameter("bundle", "").value
        self.engine = Engine(folder or Bundle.demo())
        self.labels = self.create_publisher(Image, "labels", NEWEST)
        self.vocabulary = self.create_publisher(String, "vocabulary", LATCHED)
        self.name_classes(self.declare_parameter("classes", "person, dog, car, chair").value)
        self.add_on_set_parameters_callback(self.on_parameters)
        self.create_subscription(Image, "image", self.on_image, NEWEST)

    def name_classes(self, text: str) -> None:
        """Use these names, at most 254, from the next image on, and publish them."""
        self.engine.set_classes([name.strip() for name in text.split(",") if name.strip()])
        content = {"names": list(self.engine.vocabulary.names), "unknown": 255}
        self.vocabulary.publish(String(data=json.dumps(content)))

    def on_parameters(self, parameters: list) -> SetParametersResult:
        """Rename the classes; unknown names are refused, and the old ones stay."""
        try:
            for parameter in parameters:
                if parameter.name == "classes":
                    self.name_classes(parameter.value)
        except ZssegError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def on_image(self, image: Image) -> None:
        """Label an image; one that cannot be labelled is logged and left out."""
        if image.encoding not in ("rgb8", "bgr8"):
            self.get_logger().error(f"encoding: expected rgb8 or bgr8, got {image.encoding!r}")
            return
        rows = np.frombuffer(image.data, np.uint8).reshape(image.height, image.step)
        frame = rows[:, : 3 * image.width].reshape(image.height, image.width, 3)
        frame = frame[..., ::-1] if image.encoding == "bgr8" else frame
        labels = self.engine.segment(np.ascontiguousarray(frame)).labels
        made = Image(header=image.header, height=image.height, width=image.width)
        made.encoding, made.step = "mono8", image.width
        made.data = array.array("B", labels.tobytes())  # bytes would be checked one by one
        self.labels.publish(made)


if __name__ == "__main__":
    rclpy.init()
    rclpy.spin(LabelNode())
