"""The rivals of the engine, and how they are measured: used by ``benchmarks/run.py``."""
