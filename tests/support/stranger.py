"""Runs a program in a fresh process that has transformers but not this package."""

import os
import sys
from pathlib import Path

from tests.support.launching import run_to_end

# a folder with another version (tests/run_heavy.sh)
OTHER_TRANSFORMERS = os.environ.get("OTHER_TRANSFORMERS")
WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loraprune_ds":
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""

# What a stranger does with each model. Functions that a program may use.
LOOK = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

def load(folder, kind=None, **settings):
    config = json.loads((Path(folder) / "config.json").read_text())
    kind = kind or (AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM)
    trust = "auto_map" in config
    model = kind.from_pretrained(folder, dtype="auto", trust_remote_code=trust, **settings).eval()
    for parameter in model.parameters():  # in files they begin at any byte, and products differ in the last bit
        parameter.data = parameter.data.clone()
    return model

def generate(model, prompt, **options):
    options |= dict(attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0)
    return model.generate(prompt, max_new_tokens=8, min_new_tokens=8, **options)

def logits(model, prompt, source):
    return (model(source, decoder_input_ids=prompt) if model.config.is_encoder_decoder else model(prompt)).logits

def look(model, folder, prompt, source=None, **settings):
    result = {"logits": logits(model, prompt, source)}
    result["cached"], result["uncached"] = generate(model, prompt), generate(model, prompt, use_cache=False)
    model.save_pretrained(folder + "_saved_again")
    return result | {"saved_again": logits(load(folder + "_saved_again", **settings), prompt, source)}

def tell(result, folder):
    save_file({name: tensor.detach().contiguous() for name, tensor in result.items()}, folder + ".safetensors")
    assert not any(name.partition(".")[0] == "loraprune_ds" for name in sys.modules)
"""


def ask_stranger(program: str, *arguments: str | Path, folder: Path) -> str:
    """Returns the output of a program that runs in an empty folder inside `folder`."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(elsewhere),
        "PYTHONPATH": OTHER_TRANSFORMERS or "",
    }
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE + program, *map(str, arguments)]
    return run_to_end(command, cwd=elsewhere, environment=environment, timeout=900).check().out
