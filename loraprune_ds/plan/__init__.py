"""What a run needs in memory, before it runs."""
