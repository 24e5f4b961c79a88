"""What results mean: dominance, estimates, how sure a place on the frontier is, choosing, comparing; SQL."""
