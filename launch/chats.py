"""Lets a model write chats: `python launch/chats.py path/to/llama --out chats.jsonl --tokens 1000000`.

The code is in loraprune_ds/cli/chats.py. `loraprune-ds chats` runs the same.
"""

from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    run_path(str(Path(__file__).with_name("start.py")))["start"]("chats")
