"""Techniques that store and multiply numbers of fewer bits: half precision and quantisation."""
