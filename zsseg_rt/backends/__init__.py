"""Ways to run ONNX graphs, one file per backend; imported only when chosen."""
