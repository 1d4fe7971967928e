"""Bundles in INT8 and FP8: what is quantised, measured on images, and a gate before writing.

Linear layers and convolutions get a pair of QuantizeLinear and DequantizeLinear nodes in front of
each of their inputs; TensorRT, TensorRT-RTX and OpenVINO all read such graphs. All else is float16.
"""
