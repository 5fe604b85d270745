"""A training under pruning, as every loop drives it: its steps, cuts, saved states and results."""
