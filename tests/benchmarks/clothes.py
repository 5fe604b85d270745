"""Prunes SmolLM2-135M in the clothes of other families. The numbers must be those of the LLaMA that it is.

    python -m tests.benchmarks.clothes [--steps 4] [--ranks 2]

tests/clothes.py rewrites its folder as mistral, qwen2, granite and phi3. Each rewritten model computes the same. Each
goes through launch/run.py with quickstart's config, in fewer steps. Under criterion `lora`, mistral, qwen2 and granite
must end with the LLaMA's kept groups and perplexities. In a phi3 the parts q, k and v share a LoRA A, and so do gate
and up. Its groups must be the same under `magnitude` at a learning rate that leaves LoRA at zero. Under `lora` its
perplexity must be as near to one of the LLaMA's three seeds as these are to each other. Each run is written to
results/clothes.json at once. A second start runs only what is missing there.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loraprune_ds.model.embedded import embedded_model_dir
from tests.clothes import dress
from tests.integration.launching import free_port

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "clothes.json"
SEEDS = (0, 1, 2)
EQUAL = ("mistral", "qwen2", "granite")
CRITERIA = {
    "lora": ["prune.criterion=lora"],
    "magnitude": ["prune.criterion=magnitude", "train.learning_rate=1e-12"],
}
HOLDS, MISSING = "as it must be", "a run is missing"
# What differs from quickstart's config, to be done in a minute.
SHORT = [
    "prune.prune_every=2",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "evaluate.max_windows=6",
    "checkpoint.every=null",
    "logging.report_to=[]",
]
# (family, criterion, seed) of every run
RUNS = [
    *((family, "lora", 0) for family in ("llama", *EQUAL)),
    *((family, "magnitude", 0) for family in ("llama", "phi3")),
    ("phi3", "lora", 0),
    *((family, "lora", seed) for family in ("llama", "phi3") for seed in SEEDS[1:]),
]


def main() -> int:
    """Runs all of them. Returns 1 if a number is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    changes = [f"train.steps={arguments.steps}", *SHORT]
    rows: dict[str, dict[str, Any]] = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else {}
    for family, criterion, seed in RUNS:
        name = f"{family}, {criterion}, seed {seed}"
        if name not in rows or rows[name]["changes"] != changes or rows[name]["ranks"] != arguments.ranks:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows[name] = run(family, [f"seed={seed}", *CRITERIA[criterion], *changes], arguments.ranks)
            rows[name] |= {"changes": changes, "ranks": arguments.ranks}
            RESULT.write_text(json.dumps({"verdicts": compare(rows), "runs": rows}, indent=1) + "\n")
    for name, row in rows.items():
        ppl = row["perplexity"]
        print(f"{name:32}{ppl['dense']:>12.6f}{ppl['after_last_cut']:>12.6f}{ppl['pruned']:>12.6f}")
    verdicts = compare(rows)
    print("".join(f"{name}: {verdict}\n" for name, verdict in verdicts.items()), end="")
    return int(any(verdict != HOLDS for verdict in verdicts.values()))


def run(family: str, changes: list[str], ranks: int) -> dict[str, Any]:
    """Dresses the model and runs it through the launcher. Returns what matters of the result."""
    with tempfile.TemporaryDirectory() as work:
        model, out = dress(embedded_model_dir(), family, Path(work, family)), Path(work, "run")
        command = ["deepspeed", "--quiet", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        command += ["launch/run.py", "--config", "launch/configs/quickstart.yaml"]
        for setting in (f"model.path={model}", f"output_dir={out}", *changes):
            command += ["--set", setting]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        report = json.loads((out / "report.json").read_text())
        groups = (out / "kept_groups.json").read_bytes()
    report["config"] |= {"output_dir": "run", "model": report["config"]["model"] | {"path": family}}
    kept = {key: report[key] for key in ("perplexity", "params", "versions", "hardware", "config")}
    return kept | {"kept_groups_sha256": hashlib.sha256(groups).hexdigest()}


def compare(rows: dict[str, Any]) -> dict[str, str]:
    """Says of every claim that it holds, how it does not, or that a run is missing."""

    def facts(family: str, criterion: str, *keys: str) -> Any:
        row = rows.get(f"{family}, {criterion}, seed 0", {})
        return {key: row.get(key) for key in keys}

    def verdict(same: bool, found: Any, wanted: Any) -> str:
        return MISSING if None in (*found.values(), *wanted.values()) else HOLDS if same else f"{found}, not {wanted}"

    verdicts = {}
    for family in EQUAL:
        found, wanted = (facts(name, "lora", "kept_groups_sha256", "perplexity") for name in (family, "llama"))
        verdicts[f"{family}, lora: groups and perplexities"] = verdict(found == wanted, found, wanted)
    found, wanted = (facts(name, "magnitude", "kept_groups_sha256") for name in ("phi3", "llama"))
    verdicts["phi3, magnitude: groups"] = verdict(found == wanted, found, wanted)
    seeds = [rows[name]["perplexity"]["pruned"] for seed in SEEDS if (name := f"llama, lora, seed {seed}") in rows]
    fused = facts("phi3", "lora", "perplexity")["perplexity"]
    if len(seeds) < len(SEEDS) or fused is None:
        return verdicts | {"phi3, lora: perplexity": MISSING}
    near = min(abs(fused["pruned"] - seed) for seed in seeds) <= max(seeds) - min(seeds)
    outside = f"{fused['pruned']:.2f}, where the LLaMA's seeds give {min(seeds):.2f} to {max(seeds):.2f}"
    return verdicts | {"phi3, lora: perplexity": HOLDS if near else outside}


if __name__ == "__main__":
    sys.exit(main())
