"""Checkpoints: layout, writing, reading."""
