"""Speed: `pytest benchmarks/` anywhere, `python -m benchmarks.gpu_check` where there is a GPU."""
