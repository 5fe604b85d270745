"""Converts the result of a run: `python launch/export.py runs/mine --format gguf-q8_0`.

The code is in loraprune_ds/cli/export.py. `loraprune-ds export` runs the same.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("start.py")))["start"]("export")
