"""Kernels compiled ahead of time, without a GPU, and what their machine code must be."""
