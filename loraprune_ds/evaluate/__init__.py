"""Perplexity, answers, zero-shot tasks and speed, of one model or side by side."""
