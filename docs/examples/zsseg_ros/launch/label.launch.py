"""Label a camera: ros2 launch zsseg_ros label.launch.py image:=/camera/image_raw."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

ARGUMENTS = {
    "image": ("/camera/image_raw", "topic of the camera, without /compressed"),
    "namespace": ("", "prefix of the node and of what it publishes"),
    "transport": ("raw", "raw, or compressed to read the camera's topic /compressed"),
    "bundle": ("", "bundle folder; empty for the photo demo's"),
    "classes": ("person, dog, car, chair", "class names, separated by commas"),
    "background": ("", "background phrases, separated by commas; or auto, or none"),
}
PARAMETERS = ("transport", "bundle", "classes", "background")


def generate_launch_description() -> LaunchDescription:
    """Return the node and the arguments that it takes."""
    value = {name: LaunchConfiguration(name) for name in ARGUMENTS}
    node = Node(
        package="zsseg_ros",
        executable="label_node",
        name="zsseg",
        namespace=value["namespace"],
        output="screen",
        # Without a type, "classes:=1" would be a number.
        parameters=[{name: ParameterValue(value[name], value_type=str) for name in PARAMETERS}],
        remappings=[
            ("image", value["image"]),
            ("image/compressed", [value["image"], "/compressed"]),
        ],
    )
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, node])
