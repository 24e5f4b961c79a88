"""Training: the baseline's, and the joint recovery of a recipe."""
