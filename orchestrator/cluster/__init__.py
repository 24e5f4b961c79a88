"""Studies on a Ray cluster: jobs, and what they carry."""
