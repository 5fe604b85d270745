"""Compares results: `python launch/compare.py runs/a runs/b --picture compare.png`.

The code is in loraprune_ds/cli/compare.py. `loraprune-ds compare` runs the same.
"""

from start import start

if __name__ == "__main__":
    start("compare")
