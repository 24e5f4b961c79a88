"""What a person asks: the study file with its lines, its schema and faults, techniques, constraints, the search space."""
