"""Lets a model write chats: `python launch/chats.py path/to/llama --out chats.jsonl --tokens 1000000`.

The code is in loraprune_ds/cli/chats.py. `loraprune-ds chats` runs the same.
"""

from start import start

if __name__ == "__main__":
    start("chats")
