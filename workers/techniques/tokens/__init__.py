"""Techniques that remove or merge tokens, and smaller images, which they must beat."""
