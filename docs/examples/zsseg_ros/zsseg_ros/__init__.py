"""Zero-shot semantic segmentation as a ROS 2 node."""
