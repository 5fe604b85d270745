"""Times one model in llama.cpp or vLLM. It runs in the Python that has that server, and knows nothing of this package.

serve_worker.py JOB     JOB is JSON: server, model, prompt, generated, batch, trust_remote_code, model_impl

It writes a JSON object when the model is loaded, and one for each byte that it reads, with the seconds of a round. When
its standard input is closed, it kills all processes of its group immediately, even in the middle of a round.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any

Round = Callable[[], dict[str, float]]


def load_llama_cpp(job: dict[str, Any]) -> tuple[str, Round]:
    """Returns llama.cpp's version, and a function that plays a round: the prompt, then tokens one by one."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    prompt, generated, cores = job["prompt"], job["generated"], len(os.sched_getaffinity(0))
    room = {"n_ctx": len(prompt) + generated + 1, "n_batch": len(prompt)}
    threads = {"n_threads": cores, "n_threads_batch": cores}
    model = llama_cpp.Llama(job["model"], **room, **threads, n_gpu_layers=-1, verbose=False)

    def play() -> dict[str, float]:
        model.reset()
        times = [time.perf_counter()]
        model.eval(prompt)
        times.append(time.perf_counter())
        for _ in range(generated):
            model.eval([model.sample(temp=0.0)])
        times.append(time.perf_counter())
        return {"prefill": times[1] - times[0], "decode": times[2] - times[1]}

    return llama_cpp.__version__, play


def load_vllm(job: dict[str, Any]) -> tuple[str, Round]:
    """Returns vLLM's version, and a function that plays a round: one prompt, then a batch of them."""
    import vllm  # pyright: ignore[reportMissingImports]

    prompt, generated, batch = job["prompt"], job["generated"], job["batch"]
    model = vllm.LLM(
        model=job["model"],
        trust_remote_code=job["trust_remote_code"],
        model_impl=job["model_impl"],
        max_model_len=len(prompt) + generated + 1,
        max_num_seqs=batch,
        enable_prefix_caching=False,  # every round sends the same prompt
        gpu_memory_utilization=0.4,  # two models share the GPU
    )

    def seconds(sequences: int, tokens: int) -> float:
        greedy = vllm.SamplingParams(
            temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True
        )
        began = time.perf_counter()
        model.generate([{"prompt_token_ids": prompt}] * sequences, greedy, use_tqdm=False)
        return time.perf_counter() - began

    def play() -> dict[str, float]:
        prefill = seconds(1, 1)
        return {
            "prefill": prefill,
            "decode": seconds(1, generated + 1) - prefill,
            "batch": seconds(batch, generated),
        }

    return vllm.__version__, play


LOADERS = {"llama.cpp": load_llama_cpp, "vllm": load_vllm}


def pass_on(requests: SimpleQueue[bytes]) -> None:
    while byte := os.read(0, 1):
        requests.put(byte)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    requests: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=pass_on, args=(requests,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the server prints, also from C, goes to stderr
    job = json.loads(sys.argv[1])
    version, play = LOADERS[job["server"]](job)
    answers.write(json.dumps({"version": version}) + "\n")
    answers.flush()
    while requests.get():
        answers.write(json.dumps(play()) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
