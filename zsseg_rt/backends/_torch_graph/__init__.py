"""ONNX graphs as lists of torch operations: reading, rewriting and running them."""
