"""Pruning inside training loops of other people: transformers' Trainer, TRL, accelerate."""
