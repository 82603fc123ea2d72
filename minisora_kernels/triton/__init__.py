"""Triton kernels and their launchers, one file an op; imported when a raw op of ``minisora_triton`` is first called.

A launcher has the name and the arguments of the raw op that it implements. It allocates, computes a grid, and launches:
it never waits for the device, so that it can be captured in a CUDA graph.
"""
