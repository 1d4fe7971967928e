"""Networks as functions of their operations: written as ONNX graphs, or computed in NumPy."""
