"""Plans the resources of a run: `python launch/plan.py llama-65b --gpu-memory 80 --smallest`.

The code is in loraprune_ds/cli/plan.py. `loraprune-ds plan` runs the same.
"""

from start import start

if __name__ == "__main__":
    start("plan")
