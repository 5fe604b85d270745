"""Measures a model: `python launch/evaluate.py runs/mine --dense path/to/llama`.

The code is in loraprune_ds/cli/evaluate.py. `loraprune-ds evaluate` runs the same.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("start.py")))["start"]("evaluate")
