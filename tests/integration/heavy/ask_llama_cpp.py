"""Asks llama.cpp about GGUF files: ask_llama_cpp.py JOB.json. Its Python has nothing of this project."""

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

F32 = 0  # of the key-value cache; its usual f16 blurs the comparison


def ask(question: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns logits of the prompt (tokens, vocab), greedy continuation, and the tokens of some texts."""
    model = llama_cpp.Llama(
        question["file"], n_ctx=question["context"], logits_all=True, type_k=F32, type_v=F32, flash_attn=False,
        n_threads=1, n_threads_batch=1, verbose=False,
    )  # fmt: skip
    prompt = question["prompt"]
    model.eval(prompt)
    answer = {"logits": np.array(model.scores[: len(prompt)])}
    greedy = []
    for _ in range(question["new_tokens"]):
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(greedy[-1:])
    answer["greedy"] = np.array(greedy, dtype=np.int64)
    for i, text in enumerate(question["texts"]):
        tokens = model.tokenize(text.encode(), add_bos=True, special=True)
        answer[f"text{i}"] = np.array(tokens, dtype=np.int64)
    model.close()
    return answer


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {"version": np.array(llama_cpp.__version__)}
    for name, question in job["questions"].items():
        found |= {f"{name}/{key}": value for key, value in ask(question).items()}
    np.savez(job["out"], **found)


if __name__ == "__main__":
    main()
