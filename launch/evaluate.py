"""Measures a model: `python launch/evaluate.py runs/mine --dense path/to/llama --speed`.

The code is in loraprune_ds/cli/evaluate.py. `loraprune-ds evaluate` runs the same.
"""

from start import start

if __name__ == "__main__":
    start("evaluate")
