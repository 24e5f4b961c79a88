"""Numbers, units, intervals, recipes and tables as text for people and programs."""
