"""Prunes a decoder model while it fine-tunes: `deepspeed launch/run.py --config launch/configs/paper/llama-7b.yaml`.

The code is in loraprune_ds/cli/run.py. `loraprune-ds run` runs the same.
"""

import sys

try:
    from loraprune_ds.cli.run import main
    from loraprune_ds.errors import leave, leave_on_error
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes"
    )

if __name__ == "__main__":
    leave_on_error()
    leave(main())
