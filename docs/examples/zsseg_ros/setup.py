"""Installs the package where ROS 2 looks for nodes; colcon calls it."""

from setuptools import setup

NAME = "zsseg_ros"

setup(
    name=NAME,
    version="0.1.0",
    description="Labels camera images for classes that are named at run time",
    license="Apache-2.0",
    maintainer="zsseg_rt maintainers",
    maintainer_email="maintainers@example.org",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", ["launch/label.launch.py"]),
    ],
    install_requires=["setuptools", "zsseg_rt"],
    zip_safe=True,
    entry_points={"console_scripts": [f"label_node = {NAME}.label_node:main"]},
)
