"""Lets a model write chats: `python launch/chats.py path/to/llama --out chats.jsonl --tokens 1000000`.

The code is in loraprune_ds/cli/chats.py. `loraprune-ds chats` runs the same.
"""

import sys

try:
    from loraprune_ds.cli.chats import main
    from loraprune_ds.errors import leave, leave_on_error
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes"
    )

if __name__ == "__main__":
    leave_on_error()
    leave(main())
