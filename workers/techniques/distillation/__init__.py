"""Techniques that train a student with what a teacher knows."""
