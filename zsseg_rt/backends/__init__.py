"""Ways to run ONNX graphs, one file each; imported only when chosen."""
