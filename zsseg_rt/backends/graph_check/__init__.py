"""Judge ONNX graphs before any runtime sees them."""
