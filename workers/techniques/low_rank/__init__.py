"""Attention without an N by N map."""
