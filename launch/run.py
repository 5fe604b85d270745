"""Prunes a decoder model while it fine-tunes: `deepspeed launch/run.py --config launch/configs/paper/llama-7b.yaml`.

The code is in loraprune_ds/cli/run.py. `loraprune-ds run` runs the same.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("start.py")))["start"]("run")
