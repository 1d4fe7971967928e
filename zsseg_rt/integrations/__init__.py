"""Label photos inside other systems: Ray Data and Triton Inference Server."""
