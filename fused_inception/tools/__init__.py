"""The commands behind `python -m fused_inception`, and what the library offers of them."""
