"""How the commands in launch/ end."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCKED = """
import threading, time
from loraprune_ds.command import leave_on_error

leave_on_error()
threading.Thread(target=time.sleep, args=(60,)).start()  # Python waits for it before it ends
raise RuntimeError("out of memory")
"""


def test_an_unexpected_error_ends_the_process_right_after_its_traceback() -> None:
    ended = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last):")
    assert ended.stderr.endswith("RuntimeError: out of memory\n")
