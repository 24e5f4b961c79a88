"""Techniques that remove heads, dimensions, channels and blocks for good."""
