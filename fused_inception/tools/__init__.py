"""The commands behind `python -m fused_inception`: train, predict, info."""
