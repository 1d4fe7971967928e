"""Bundles in INT8 and FP8: pairs of QuantizeLinear and DequantizeLinear; all else is float16."""
