"""What the engine is compared with, and how: used by ``benchmarks/run.py``."""
