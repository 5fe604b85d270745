"""Plans the resources of a run: `python launch/plan.py llama-65b --gpu-memory 80 --smallest`.

The code is in loraprune_ds/cli/plan.py. `loraprune-ds plan` runs the same.
"""

import sys

try:
    from loraprune_ds.cli.plan import main
    from loraprune_ds.errors import leave
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes"
    )

if __name__ == "__main__":
    leave(main())
