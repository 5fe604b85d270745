"""What a run needs in memory, traffic and time, before it runs."""
