"""Bugs that stay planted: each is applied to a copy of the tree, where a named test must fail."""
