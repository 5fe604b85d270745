"""Plans the resources of a run: `python launch/plan.py llama-65b --gpu-memory 80 --smallest`.

The code is in loraprune_ds/cli/plan.py. `loraprune-ds plan` runs the same.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("start.py")))["start"]("plan")
