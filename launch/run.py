"""Prunes a decoder model while it fine-tunes: `deepspeed launch/run.py --config launch/configs/paper/llama-7b.yaml`.

The code is in loraprune_ds/cli/run.py. `loraprune-ds run` runs the same.
"""

from start import start

if __name__ == "__main__":
    start("run")
