"""Timings of the kernels against plain PyTorch, over the specs that the tests use."""
