"""Numbers of an artefact: speed against the strong baseline, memory, counts, and their intervals."""
