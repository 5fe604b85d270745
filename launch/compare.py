"""Compares results: `python launch/compare.py runs/a runs/b --picture compare.png`.

The code is in loraprune_ds/cli/compare.py. `loraprune-ds compare` runs the same.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("start.py")))["start"]("compare")
