"""ONNX without the onnx package: operations, NumPy results, graphs and their files."""
