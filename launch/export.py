"""Converts the result of a run: `python launch/export.py runs/mine --format gguf-q8_0`.

The code is in loraprune_ds/cli/export.py. `loraprune-ds export` runs the same.
"""

import sys

try:
    from loraprune_ds.cli.export import main
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes"
    )

if __name__ == "__main__":
    sys.exit(main())
