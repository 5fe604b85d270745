"""The families of models: base.py lists what a family answers, each other file has one kind of architecture."""
