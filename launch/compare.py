"""Compares results: `python launch/compare.py runs/a runs/b --picture compare.png`.

The code is in loraprune_ds/cli/compare.py. `loraprune-ds compare` runs the same.
"""

import sys

try:
    from loraprune_ds.cli.compare import main
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes"
    )

if __name__ == "__main__":
    sys.exit(main())
