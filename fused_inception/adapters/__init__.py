"""Blocks of other libraries, and of our reference, that become fused ones in place, and go back."""
