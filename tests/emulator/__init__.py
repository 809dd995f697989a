"""Runs compiled kernels, as PTX, on a CPU."""
