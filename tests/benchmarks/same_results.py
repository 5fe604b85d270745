"""Proves that a change of the code changed no result.

    python -m tests.benchmarks.same_results --reference CHECKOUT [--ranks 1 2 3] [--quickstart] [--work FOLDER]

Two checkouts prune the same tiny random models with launch/run.py on the CPU: every criterion with every ranking, the
quality settings, a mixture of experts, int8 weights and a mixture of data. All results must have the same bits: kept
groups, losses, perplexities, every tensor of every checkpoint, and the exported model. One line per case says `equal`
or the first difference. The exit code is 1 if anything differs. It takes about five minutes per checkout.

Results of the reference are kept in the work folder under its commit. Only commands and files drive the two sides, so
any two checkouts can be compared.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tests.benchmarks.running import ROOT, make_parser
from tests.families import tiny_model
from tests.integration.launching import on_ranks, run_to_end, write_text
from tests.oracle.models import make_tiny_llama

WORK = ROOT / "runs" / "same_results"
WINDOW = 32
TIMEOUT = 3600  # seconds of one run
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# Odd sizes: shards of ranks end inside rows, and head_dim is not hidden / heads.
SIZES: dict[str, Any] = {"heads": 10, "kv_heads": 5, "head_dim": 6, "hidden": 50, "ffn": 61, "layers": 4, "vocab": 259}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"seed": 1},
    "biased": {"seed": 2, "biases": True, "tie": True, "hidden": 60},
    "mistral": {"seed": 3, "model_type": "mistral"},
}
EXPERTS = "mixtral"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A run to compare. Without a model it is the shipped quickstart."""

    name: str
    ranks: int
    model: str | None = "plain"
    settings: Settings = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"

    @property
    def folder(self) -> str:
        return f"{self.name.replace(', ', '-').replace(' ', '_')}-{self.ranks}"


HERE = "WORK"  # stands for the work folder in settings
MIXTURE = [{"path": f"{HERE}/text.txt", "weight": 0.7}, {"path": f"{HERE}/more.txt", "weight": 0.3}]
CRITERIA = ("lora", "lora_squared", "gradient", "magnitude", "random")
GLOBAL = {"ranking": "global", "ratio": 0.35}
ALL_LEVERS: Settings = {
    "prune": {**GLOBAL, "criterion": "gradient", "score_every": 2, "compensate": "least_squares"},
    "train": {"distill_weight": 0.5, "recovery_steps": 2},
}
HALF: Settings = {"model": {"dtype": "bfloat16"}}
CHECKPOINTING: Settings = {
    "prune": {"ratio": 0.25, "protected_first": 1, "protected_last": 1},
    "train": {"gradient_checkpointing": True, "global_batch_size": 12, "micro_batch_size": 2},
}
FISHER: Settings = {"prune": {"criterion": "fisher", "compensate": "least_squares"}}
LEVERS: dict[str, tuple[str, Settings]] = {
    "fisher, least squares": ("plain", FISHER),
    "fisher, least squares, mistral": ("mistral", FISHER),
    "lora, mistral": ("mistral", {}),
    "experts": (EXPERTS, {"prune": {"ratio": 0.25}}),
    "experts, fisher": (EXPERTS, {"prune": {"ratio": 0.25, "criterion": "fisher"}}),
    "int8": ("plain", {"model": {"frozen": "int8"}}),
    "int8, fisher, least squares": ("plain", {"model": {"frozen": "int8"}, **FISHER}),
    "mixture of data": ("plain", {"data": {"path": MIXTURE, "window": WINDOW}}),
    "least squares": ("biased", {"prune": {**GLOBAL, "compensate": "least_squares"}}),
    "distillation": ("plain", {"train": {"distill_weight": 0.5}}),
    "head ratio": ("mistral", {"prune": {"head_ratio": 0.3, "channel_multiple": 2}}),
    "gradient checkpointing, protected": ("biased", CHECKPOINTING),
    "all levers": ("plain", ALL_LEVERS),
    "bf16": ("biased", HALF),
    "bf16, all levers": ("plain", {**ALL_LEVERS, **HALF}),
}


def tiny_cases(rank_counts: Iterable[int]) -> list[Case]:
    """Lists criteria times rankings and the quality settings, at all these numbers of ranks."""
    rankings: dict[str, dict[str, Any]] = {"uniform": {}, "global": GLOBAL}
    named: dict[str, tuple[str, Settings]] = {
        f"{criterion}, {ranking}": ("plain", {"prune": {**values, "criterion": criterion}})
        for criterion, (ranking, values) in product(CRITERIA, rankings.items())
    }
    return [Case(name, ranks, *case) for ranks in rank_counts for name, case in {**named, **LEVERS}.items()]


def base_config(work: Path, model: str) -> Settings:
    """Returns a run of six steps. It cuts after 3 and 5, saves after 4 and 6, and has dropout."""
    return {
        "model": {"path": str(work / "models" / model), "dtype": "float32"},
        "lora": {"r": 3},
        "data": {"path": str(work / "text.txt"), "held_out": str(work / "held_out.txt"), "window": WINDOW},
        "prune": {"ratio": 0.4, "prune_every": 2, "warmup_fraction": 0.2, "cooldown_fraction": 0.2}
        | {"protected_first": 0, "protected_last": 0, "channel_multiple": 1},
        "train": {"steps": 6, "global_batch_size": 6, "micro_batch_size": 1, "learning_rate": 1e-2},
        "evaluate": {"window": WINDOW, "max_windows": 8, "batch_size": 3},
        "checkpoint": {"every": 4, "keep_last": 9},
    }


def make_inputs(work: Path, reference: Path) -> None:
    """Makes the models, texts and DeepSpeed's config once. Both sides read the same files."""
    if (work / "zero3.json").exists():
        return
    for name, options in MODELS.items():
        make_tiny_llama(work / "models" / name, **{**SIZES, **options})
    shutil.copytree(
        work / "models" / "plain", work / "models" / EXPERTS, ignore=shutil.ignore_patterns("*.safetensors")
    )
    tiny_model(EXPERTS, seed=1, vocab_size=SIZES["vocab"]).save_pretrained(work / "models" / EXPERTS)
    write_text(work / "text.txt", 12_000)
    write_text(work / "held_out.txt", 2_000, start=50_000)
    write_text(work / "more.txt", 4_000, start=70_000)
    config = json.loads((reference / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shards the smallest weights, too
    (work / "zero3.json").write_text(json.dumps(config, indent=2))


def config_text(case: Case, work: Path, checkout: Path) -> str:
    """Returns the YAML of a case, all but its output folder."""
    if case.model is None:
        return (checkout / "launch" / "configs" / "quickstart.yaml").read_text()
    config = base_config(work, case.model)
    for section, values in case.settings.items():
        config[section] |= values
    text = yaml.safe_dump({"deepspeed": str(work / "zero3.json"), "output_dir": "given", **config})
    return text.replace(f"path: {HERE}", f"path: {work}")


def run_case(case: Case, checkout: Path, work: Path, root: Path) -> str | None:
    """Runs a case below `root` with the code of a checkout. Returns why it failed, or None."""
    out, config = root / case.folder, root / f"{case.folder}.yaml"
    shutil.rmtree(out, ignore_errors=True)
    config.write_text(config_text(case, work, checkout))
    command = [*on_ranks(case.ranks), str(checkout / "launch" / "run.py"), "--config", str(config)]
    command += ["--set", f"output_dir={out}"]
    try:
        ended = run_to_end(command, cwd=checkout, environment=CPU | {"PYTHONPATH": str(checkout)}, timeout=TIMEOUT)
    except AssertionError as error:
        return str(error)
    return None if ended.code == 0 and is_finished(out) else ended.everything


def is_finished(out: Path) -> bool:
    status = out / "status.json"
    return status.is_file() and json.loads(status.read_text())["state"] == "finished"


def is_kept(case: Case, checkout: Path, work: Path, root: Path) -> bool:
    """Tells whether a finished run of just this case is there already."""
    out, config = root / case.folder, root / f"{case.folder}.yaml"
    return is_finished(out) and config.read_text() == config_text(case, work, checkout)


def facts(out: Path) -> dict[str, Any]:
    """Returns the kept groups, and all losses and perplexities."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "kept_groups.json": json.loads((out / "kept_groups.json").read_text()),
        "losses": [record.get("loss") for record in records if record["kind"] == "step"],
        "perplexities": json.loads((out / "report.json").read_text())["perplexity"],
    }


def tensor_files(out: Path) -> set[Path]:
    return {path.relative_to(out) for part in ("checkpoints/*", "model") for path in out.glob(f"{part}/*.safetensors")}


def differences(old: Path, new: Path) -> Iterator[str]:
    """Yields the differences of two runs, the earliest result first."""
    old_facts, new_facts = facts(old), facts(new)
    if old_facts != new_facts:
        yield first_unequal(old_facts, new_facts)
    for path in sorted(tensor_files(old) | tensor_files(new)):
        ours, theirs = (load_file(run / path) if (run / path).exists() else {} for run in (old, new))
        for name in sorted(ours.keys() | theirs.keys()):
            if difference := tensor_difference(ours.get(name), theirs.get(name)):
                yield f"{path} {name}: {difference}"


def first_unequal(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        name = next(key for key in old if old[key] != new[key])
        return f"{name}: {first_unequal(old[name], new[name])}"
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        index = next(i for i, value in enumerate(old) if value != new[i])
        return f"{index}: {first_unequal(old[index], new[index])}"
    return f"{old} became {new}"[:160]


def tensor_difference(old: Tensor | None, new: Tensor | None) -> str | None:
    """Tells how two tensors differ, None if all bits are equal."""
    if old is None or new is None:
        return "in one run only"
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}"
    integer = INTEGERS[old.element_size()]
    if torch.equal(old.view(integer), new.view(integer)):
        return None
    return f"largest difference {(old.double() - new.double()).abs().max():.3g}"


def compare_case(case: Case, checkout: Path, work: Path, kept: Path, fresh: Path) -> str:
    """Runs a case with the new code. Compares it with the kept results and returns the verdict."""
    if failure := run_case(case, checkout, work, fresh):
        return f"failed: {failure}"
    try:
        found = list(differences(kept / case.folder, fresh / case.folder))
    except (OSError, ValueError, KeyError) as error:
        return f"a result cannot be read: {error!r}"
    if found:
        return f"{found[0]}   ({len(found)} differences)"
    shutil.rmtree(fresh / case.folder)
    return "equal"


def commit_of(checkout: Path) -> str:
    """Returns the commit of a checkout, which must have no changes."""
    git = ["git", "-C", str(checkout)]
    changes = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True)
    if changes:
        sys.exit(f"error: the reference {checkout} has changes that are in no commit:\n{changes}")
    return subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()


def check_imports(*checkouts: Path) -> None:
    """Makes sure that the commands of a checkout import its own package."""
    ask = [sys.executable, "-c", "import loraprune_ds; print(loraprune_ds.__file__)"]
    for checkout in checkouts:
        found = run_to_end(ask, cwd=Path("/"), environment={"PYTHONPATH": str(checkout)}).out.strip()
        if not Path(found).is_relative_to(checkout):
            sys.exit(f"error: a run of {checkout} would import {found}")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True, help="checkout whose results are right")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="checkout to compare; default: this one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--quickstart", action="store_true", help="also the shipped quickstart, at 2 ranks")
    parser.add_argument("--work", type=Path, default=WORK, help="for inputs and results; default: runs/same_results")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--reference-only", action="store_true", help="run no new side; keep the reference for later")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    reference, checkout, work = (p.resolve() for p in (arguments.reference, arguments.checkout, arguments.work))
    kept = work / "reference" / commit_of(reference)
    kept.mkdir(parents=True, exist_ok=True)
    check_imports(reference, checkout)
    make_inputs(work, reference)
    cases = tiny_cases(arguments.ranks) + ([Case("quickstart", 2, None)] if arguments.quickstart else [])
    cases = [case for case in cases if arguments.only in str(case)]
    fresh = Path(tempfile.mkdtemp(prefix="new-", dir=work))
    bad = 0
    for case in cases:
        began, verdict = time.monotonic(), "kept"
        if not is_kept(case, reference, work, kept) and (failure := run_case(case, reference, work, kept)):
            verdict = f"the reference failed: {failure}"
        elif not arguments.reference_only:
            verdict = compare_case(case, checkout, work, kept, fresh)
        bad += verdict not in ("equal", "kept")
        print(f"{case!s:<44}{time.monotonic() - began:>5.0f} s  {verdict}", flush=True)
    print(f"{len(cases)} cases, {bad} not equal{f': see {fresh}' if bad else ''}")
    if not bad:
        shutil.rmtree(fresh)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
