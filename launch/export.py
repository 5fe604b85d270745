"""Converts the result of a run: `python launch/export.py runs/mine --format gguf-q8_0`.

The code is in loraprune_ds/cli/export.py. `loraprune-ds export` runs the same.
"""

from start import start

if __name__ == "__main__":
    start("export")
