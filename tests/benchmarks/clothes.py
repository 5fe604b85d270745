"""Prunes SmolLM2-135M in the clothes of other families. The numbers must be those of the LLaMA that it is.

    python -m tests.benchmarks.clothes [--steps 6] [--ranks 2]

tests/clothes.py rewrites its folder as mistral, qwen2, granite and phi3. Each rewritten model computes the same. Each
goes through launch/run.py with quickstart's config, in fewer steps. Under criterion `lora`, mistral, qwen2 and granite
must end with the LLaMA's kept groups and perplexities. In a phi3 the parts q, k and v share a LoRA A, and so do gate
and up. Its groups must be the same under `magnitude`, which reads frozen weights only. Under `lora` its perplexity must
be as near to one of the LLaMA's three seeds as these are to each other. Writes results/clothes.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.report.provenance import hardware, versions
from tests.benchmarks.same_results import first_unequal
from tests.clothes import CLOTHES, dress
from tests.integration.launching import free_port

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "clothes.json"
SEEDS = (0, 1, 2)
EQUAL = ("mistral", "qwen2", "granite")
# (family, criterion, seed) of every run
RUNS = [
    *(("llama", "lora", seed) for seed in SEEDS),
    *((family, "lora", 0) for family in (*EQUAL, "phi3")),
    *((family, "magnitude", 0) for family in ("llama", "phi3")),
]


def main() -> int:
    """Runs all of them. Returns 1 if a number is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folders = {family: dress(embedded_model_dir(), family, Path(work, family)) for family in CLOTHES}
        rows, groups = {}, {}
        for family, criterion, seed in RUNS:
            name = f"{family}, {criterion}, seed {seed}"
            print(f"{name} ...", file=sys.stderr, flush=True)
            out = Path(work, "run")
            report = run(folders[family], settings(criterion, seed, arguments.steps), arguments.ranks, out)
            groups[name] = json.loads((out / "kept_groups.json").read_text())["layers"]
            rows[name] = {"perplexity": report["perplexity"], "params": report["params"], "config": report["config"]}
            rows[name]["config"] |= {"output_dir": "run", "model": report["config"]["model"] | {"path": family}}
            shutil.rmtree(out)
    verdicts = compare(rows, groups)
    result = {"verdicts": verdicts, "ranks": arguments.ranks, "versions": versions(), "hardware": hardware("cpu")}
    RESULT.write_text(json.dumps(result | {"runs": rows}, indent=1) + "\n")
    for name, row in rows.items():
        ppl = row["perplexity"]
        print(f"{name:32}{ppl['dense']:>12.6f}{ppl['after_last_cut']:>12.6f}{ppl['pruned']:>12.6f}")
    print("".join(f"{name}: {verdict}\n" for name, verdict in verdicts.items()), end="")
    return int(any(verdict != "as it must be" for verdict in verdicts.values()))


def settings(criterion: str, seed: int, steps: int) -> list[str]:
    """Returns what differs from quickstart's config."""
    return [
        f"seed={seed}",
        f"train.steps={steps}",
        f"prune.criterion={criterion}",
        "prune.prune_every=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "evaluate.max_windows=8",
        "checkpoint.every=null",
        "logging.tensorboard=false",
    ]


def run(model: Path, changes: list[str], ranks: int, out: Path) -> dict[str, Any]:
    """Returns report.json of a run through the launcher."""
    launcher = ["deepspeed", "--quiet", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    command = [*launcher, "launch/run.py", "--config", "launch/configs/quickstart.yaml"]
    for setting in (f"model.path={model}", f"output_dir={out}", *changes):
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads((out / "report.json").read_text())


def compare(rows: dict[str, Any], groups: dict[str, Any]) -> dict[str, str]:
    """Says of every claim that it holds, or how it does not."""

    def facts(name: str) -> dict[str, Any]:
        return {"kept groups": groups[name], "perplexity": rows[name]["perplexity"]}

    verdicts = {}
    llama = facts("llama, lora, seed 0")
    for family in EQUAL:
        found = facts(f"{family}, lora, seed 0")
        verdicts[f"{family}, lora"] = "as it must be" if found == llama else first_unequal(llama, found)
    fused, apart = groups["phi3, magnitude, seed 0"], groups["llama, magnitude, seed 0"]
    verdicts["phi3, magnitude"] = "as it must be" if fused == apart else first_unequal(apart, fused)
    spread = [rows[f"llama, lora, seed {seed}"]["perplexity"]["pruned"] for seed in SEEDS]
    width, found = max(spread) - min(spread), rows["phi3, lora, seed 0"]["perplexity"]["pruned"]
    inside = min(spread) - width <= found <= max(spread) + width
    outside = f"{found:.2f}, where the LLaMA's seeds give {min(spread):.2f} to {max(spread):.2f}"
    verdicts["phi3, lora"] = "as it must be" if inside else outside
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
