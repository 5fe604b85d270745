"""Opens a model and lets it write."""
