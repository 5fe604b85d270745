"""Compares criteria and rankings by perplexity on SmolLM2-135M. All see equal tokens and remove an equal fraction.

    python tests/benchmarks/criteria.py [--text FILE --held-out FILE] [--steps 40] [--ranks 2] [--runs NAME ...]

Every run is launch/run.py through the deepspeed launcher. Each changes one setting. The script prints a table of
held-out perplexity. It writes tests/benchmarks/results/criteria.json with config, versions, commit and hardware of
every run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "criteria.json"
RUNS: dict[str, list[str]] = {
    "lora, uniform": [],
    "lora_squared, uniform": ["prune.criterion=lora_squared"],
    "magnitude, uniform": ["prune.criterion=magnitude"],
    "random, uniform": ["prune.criterion=random"],
    "lora, uniform, nothing protected": ["prune.protected_first=0", "prune.protected_last=0"],
    "lora, global": ["prune.ranking=global"],
    "lora, global, l2 per module": ["prune.ranking=global", "prune.normalize=l2"],
    "lora, global, at most 60 % of a layer": ["prune.ranking=global", "prune.max_layer_ratio=0.6"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="text to tune on; default: the embedded one")
    parser.add_argument("--held-out", help="text to measure on; default: a held-out part of the text")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--windows", type=int, default=64, help="of 128 tokens, to measure on")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(RUNS))
    arguments = parser.parse_args()
    RESULT.parent.mkdir(exist_ok=True)
    results = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else {}
    for name in arguments.runs:
        results[name] = run(name, arguments)
        RESULT.write_text(json.dumps({"runs": results}, indent=1) + "\n")
    print(f"{'':40}{'removed':>10}{'dense':>9}{'after cut':>11}{'exported':>10}")
    for name, result in results.items():
        ppl, params = result["perplexity"], result["params"]
        removed = 1 - params["linear_pruned"] / params["linear_dense"]
        print(f"{name:40}{removed:>10.2%}{ppl['dense']:>9.2f}{ppl['after_last_cut']:>11.2f}{ppl['pruned']:>10.2f}")


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """report.json of one run in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output_dir={folder}/run",
            f"train.steps={arguments.steps}",
            f"prune.ratio={arguments.ratio}",
            "train.global_batch_size=8",
            f"evaluate.max_windows={arguments.windows}",
            "checkpoint.every=null",
            "logging.report_to=[]",
            *([f"data.path={arguments.text}"] if arguments.text else []),
            *([f"data.held_out={arguments.held_out}"] if arguments.held_out else []),
            *RUNS[name],
        ]
        launcher = ["deepspeed", "--quiet", "--num_accelerators", str(arguments.ranks), "--master_port", "29517"]
        command = [*launcher, "launch/run.py", "--config", "launch/configs/quickstart.yaml"]
        command += [part for setting in settings for part in ("--set", setting)]
        print(f"{name} ...", file=sys.stderr, flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
        report = json.loads(Path(folder, "run", "report.json").read_text())
        report["config"]["output_dir"] = "run"  # a temporary folder says nothing
        return report


if __name__ == "__main__":
    main()
