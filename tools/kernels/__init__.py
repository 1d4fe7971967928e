"""How tools/benchmark_kernels.py times kernels."""
