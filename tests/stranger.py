"""The first lines of a program for a process that must do without this package, installed as it is."""

WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loraprune_ds":
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""
