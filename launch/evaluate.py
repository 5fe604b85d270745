"""Measures a model: `python launch/evaluate.py runs/mine --dense path/to/llama --speed`.

The code is in loraprune_ds/cli/evaluate.py. `loraprune-ds evaluate` runs the same.
"""

import sys

try:
    from loraprune_ds.cli.evaluate import main
    from loraprune_ds.errors import leave, leave_on_error
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes"
    )

if __name__ == "__main__":
    leave_on_error()
    leave(main())
