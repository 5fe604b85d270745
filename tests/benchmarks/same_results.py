"""Proves that a change of the code changed no result.

    python -m tests.benchmarks.same_results --reference CHECKOUT [--checkout CHECKOUT] [--work FOLDER]

Two checkouts prune the same tiny random models on the CPU, by launch/run.py, in transformers' Trainer, and in a loop
under FSDP2. All results must have the same bits: kept groups, losses, perplexities, every tensor of every checkpoint,
and the exported models. One line per case says `equal` or the first difference. The exit code is 1 if anything differs.

Results of the reference are kept in the work folder under its commit. Only commands and files drive the two sides, so
any two checkouts can be compared whose settings have the names used here.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path
from transformers.utils.logging import disable_progress_bar

from tests.benchmarks.running import ROOT, cpu_environment, make_parser
from tests.oracle.models import make_tiny_llama, make_tokenizer
from tests.support.families import SIZES, tiny_model
from tests.support.launching import write_text
from tests.support.multimodal import multimodal

WORK = ROOT / "runs" / "same_results"
RUN = "launch/run.py"  # of a checkout
TRAINER = str(Path(__file__).with_name("same_results_trainer.py"))
FSDP = str(Path(__file__).with_name("same_results_fsdp.py"))
RANKS = Path(__file__).with_name("same_results_ranks.py")
WINDOW = 32
TIMEOUT = 900  # seconds of a case
HERE = "$WORK"  # stands for the work folder in settings
# Odd sizes: shards of ranks end inside rows, and head_dim is not hidden / heads.
LLAMA: dict[str, Any] = {
    "heads": 10,
    "kv_heads": 5,
    "head_dim": 6,
    "hidden": 50,
    "ffn": 61,
    "layers": 4,
    "vocab": 259,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {"seed": 1},
    "biased": {"seed": 2, "biases": True, "tie": True, "hidden": 60},
    "mistral": {"seed": 3, "model_type": "mistral"},
    "blocks": {"seed": 4, "hidden": 64, "heads": 8, "kv_heads": 4, "biases": True},
}
FAMILIES = {"mixtral": "mixtral", "shared": "qwen2_moe", "hybrid": "qwen3_5_text", "t5": "t5"}
RESULTS = (
    "metrics.jsonl",
    "kept_groups.json",
    "report.json",
    "model*/*config.json",
    "model*/*.safetensors",
)
CHECKPOINTS = ("checkpoint*/**/*.safetensors", "checkpoint*/**/*.pt")
MISSING = "nothing"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Describes a run to compare. Without a model it is base.yaml, but shorter. It `needs` a path of a checkout.

    `first`: settings of an earlier run, whose export this one starts from.
    """

    name: str
    model: str | None = "llama"
    settings: Settings = field(default_factory=dict)
    ranks: int = 2
    script: str = RUN
    needs: str = ""
    first: Settings | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"

    @property
    def start(self) -> "Case | None":
        """The run whose export this one starts from."""
        if self.first is None:
            return None
        return replace(self, name=f"{self.name}, first", settings=self.first, first=None)

    @property
    def folder(self) -> str:
        return f"{self.name.replace(', ', '-').replace(' ', '_')}-{self.ranks}"

    def config(self, checkout: Path, work: Path) -> dict[str, Any]:
        """Returns the YAML of the run, all but its output folder."""
        if self.model is None:
            # In older commits the quickstart has these settings.
            files = ("tests/benchmarks/base.yaml", "launch/configs/quickstart.yaml")
            base = yaml.safe_load(
                next(x for file in files if (x := checkout / file).is_file()).read_text()
            )
            return base | {"train": base["train"] | {"steps": 8}}
        config = base_config(work, self.model)
        for section, values in self.settings.items():
            config[section] |= values
        return yaml.safe_load(yaml.safe_dump(config).replace(HERE, str(work)))


def base_config(work: Path, model: str) -> dict[str, Any]:
    """Returns a run of six steps. It cuts after 3 and 5, saves after 4 and 6, and has dropout."""
    return {
        "deepspeed": str(work / "zero3.json"),
        "model": {"path": str(work / "models" / model), "dtype": "float32"},
        "lora": {"r": 3},
        "data": {"path": f"{HERE}/text.txt", "held_out": f"{HERE}/held_out.txt", "window": WINDOW},
        "prune": {"ratio": 0.4, "prune_every": 2, "warmup_fraction": 0.2, "cooldown_fraction": 0.2}
        | {"channel_multiple": 1},
        "train": {"steps": 6, "global_batch_size": 6, "micro_batch_size": 1, "learning_rate": 1e-2},
        "evaluate": {"window": WINDOW, "max_windows": 8},
        "checkpoint": {"every": 4, "keep_last": 9},
    }


LORA: Settings = {"prune": {"criterion": "lora", "compensate": "least_squares"}}
PAPER: Settings = {
    "prune": {"criterion": "lora", "ranking": "uniform", "normalize": "l2", "compensate": "none"}
    | {"protected_first": None, "protected_last": 1},
    "train": {"distill_weight": 0},
}
PLAIN: Settings = {
    "prune": {"compensate": "none", "normalize": "none"},
    "train": {"distill_weight": 0},
}
UNIFORM: Settings = {"prune": {"ranking": "uniform"}}
LESS: Settings = {"prune": {"ratio": 0.25}}
NF4: Settings = {"model": {"nf4": True}}
INT8: Settings = {"model": {"frozen": "int8"}}
MIXTURE = [{"path": f"{HERE}/text.txt", "weight": 0.7}, {"path": f"{HERE}/more.txt", "weight": 0.3}]
PART = {"held_out": None, "held_out_fraction": 0.1}
ANSWERS = {
    "path": f"{HERE}/answers.jsonl",
    "format": "instruction",
    "input_field": None,
    "packing": True,
    **PART,
}
PAIRS = {"path": f"{HERE}/pairs.jsonl", "format": "seq2seq", **PART}
CHECKPOINTING: Settings = {
    "train": {"gradient_checkpointing": True, "global_batch_size": 12, "micro_batch_size": 2}
}
CASES = [
    *(
        Case(f"fisher, {model}", model, {}, ranks)
        for model in ("llama", "mistral")
        for ranks in (1, 2, 3)
    ),
    *(
        Case(f"lora, {model}", model, LORA, ranks)
        for model in ("llama", "mistral")
        for ranks in (1, 2, 3)
    ),
    *(Case("paper", "llama", PAPER, ranks) for ranks in (1, 2, 3)),
    Case("fisher, uniform", "llama", UNIFORM),
    Case("fisher, no refit", "biased", PLAIN),
    Case("magnitude", "llama", {"prune": {"criterion": "magnitude"}}),
    Case("random", "llama", {"prune": {"criterion": "random"}}),
    Case("checkpointing", "biased", CHECKPOINTING),
    Case("bf16", "biased", {"model": {"dtype": "bfloat16"}}),
    Case("bf16, lora, int8", "llama", {**LORA, "model": {"dtype": "bfloat16", "frozen": "int8"}}),
    Case("int8", "llama", INT8),
    Case("int8, paper", "llama", {**PAPER, **INT8}),
    Case("head ratio", "mistral", {"prune": {"head_ratio": 0.3, "channel_multiple": 2}}),
    Case(
        "recovery, cosine",
        "llama",
        {"train": {"recovery_steps": 2, "lr_scheduler": "cosine", "warmup_steps": 1}},
    ),
    Case("parameters", "llama", {"prune": {"ratio": None, "target": "0.08M"}}),
    Case("memory", "llama", {"prune": {"ratio": None, "target": "0.17MiB", "target_context": 64}}),
    Case("chain", "llama", LESS, first=LESS),
    Case("mixture of data", "llama", {"data": {"path": MIXTURE}}),
    Case("packed answers", "llama", {"data": {**ANSWERS, "window": 64}}),
    Case("experts", "mixtral", LESS),
    Case("experts, lora", "mixtral", {"prune": LESS["prune"] | {"criterion": "lora"}}),
    Case("shared experts, int8", "shared", {**LESS, **INT8}),
    Case("hybrid", "hybrid", LESS),
    Case("hybrid, lora", "hybrid", {"prune": LESS["prune"] | LORA["prune"]}),
    Case("T5", "t5", {**LESS, "data": PAIRS}),
    Case("tower", "tower", LESS),
    Case("callback", "llama", {}, script=TRAINER),
    Case("callback, paper", "biased", PAPER, script=TRAINER),
    *(
        Case(
            f"callback, nf4, {compensate}",
            "blocks",
            {**NF4, "prune": {"compensate": compensate}},
            n,
            TRAINER,
        )
        for n, compensate in ((2, "least_squares"), (1, "none"))
    ),
    *(
        Case(f"FSDP2, {name}", "biased", settings, ranks, FSDP, "loraprune_ds/fsdp")
        for name, settings, ranks in (("fisher", {}, 2), ("lora", LORA, 3))
    ),
    Case("quickstart", None),
]


def make_inputs(work: Path, reference: Path) -> None:
    """Makes the models, texts and DeepSpeed's config once. Both sides read the same files."""
    if (work / "zero3.json").exists():
        return
    disable_progress_bar()
    for name, options in LLAMAS.items():
        make_tiny_llama(work / "models" / name, **{**LLAMA, **options})
    made = {name: tiny_model(family, seed=1) for name, family in FAMILIES.items()}
    for name, model in (made | {"tower": multimodal("qwen3_5")}).items():
        model.save_pretrained(work / "models" / name)
        make_tokenizer(SIZES["vocab_size"]).save_pretrained(work / "models" / name)
    (work / "models" / "tower" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "any"}'
    )
    lines = write_text(work / "text.txt", 12_000).read_text().splitlines()
    write_text(work / "held_out.txt", 2_000, start=50_000)
    write_text(work / "more.txt", 4_000, start=70_000)
    long = [line for line in lines if len(line) > 20 and line[0] != " "]
    rows = {
        "answers": [{"instruction": line[:8], "response": line[8:20]} for line in long],
        "pairs": [{"source": line[:8], "target": line[8:1:-1]} for line in long],
    }
    for name, values in rows.items():
        (work / f"{name}.jsonl").write_text("\n".join(map(json.dumps, values)))
    config = json.loads((reference / "ds_configs" / "zero3.json").read_text())
    # shards the smallest weights, too
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (work / "zero3.json").write_text(json.dumps(config, indent=2))


class Side:
    """Runs cases below `root` with the code of a checkout, on ranks that have the imports."""

    def __init__(self, checkout: Path, work: Path, root: Path) -> None:
        self.checkout, self.work, self.root = checkout, work, root
        root.mkdir(parents=True, exist_ok=True)
        self._ranks: subprocess.Popen[str] | None = None

    def run(self, case: Case) -> str | None:
        """Returns why the case failed, or None."""
        if self._ranks is None:
            self._ranks = self._start()
        if case.start and (failure := self.run(case.start)):
            return failure
        out, log = self.root / case.folder, self.root / f"{case.folder}.log"
        shutil.rmtree(out, ignore_errors=True)
        log.unlink(missing_ok=True)
        config = self._file(case, "yaml")
        config.write_text(self._text(case))
        script = str(self.checkout / case.script)  # TRAINER and FSDP are of this checkout
        argv = [script, "--config", str(config)]
        job = {"ranks": case.ranks, "argv": argv, "log": str(log), "timeout": TIMEOUT}
        pipes: Any = self._ranks
        print(json.dumps(job), file=pipes.stdin, flush=True)
        codes = json.loads(pipes.stdout.readline() or '"no answer"')
        if codes != [0] * case.ranks:
            return f"exit codes {codes}, {log} ends with\n{log.read_text()[-1500:]}"
        self._file(case, "done").write_text(config.read_text())
        return None

    def has(self, case: Case) -> bool:
        """Tells whether a finished run of just this case is there already."""
        done = self._file(case, "done")
        return done.exists() and done.read_text() == self._text(case)

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.communicate()

    def _file(self, case: Case, suffix: str) -> Path:
        return self.root / f"{case.folder}.{suffix}"

    def _text(self, case: Case) -> str:
        config = case.config(self.checkout, self.work)
        if case.start:
            config["model"]["path"] = str(self.root / case.start.folder / "model")
        return yaml.safe_dump(config | {"output_dir": str(self.root / case.folder)})

    def _start(self) -> subprocess.Popen[str]:
        """Starts the ranks' process. Its imports must be those of the checkout, which has its own cache of tokens."""
        own = {
            "PYTHONPATH": str(self.checkout),
            "HF_DATASETS_CACHE": str(self.root / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        own["PYTHONHASHSEED"] = "0"  # PEFT writes a set of names in its order
        python, environment = [sys.executable, "-P"], cpu_environment(**own)
        ask = [*python, "-c", "import loraprune_ds; print(loraprune_ds.__file__)"]
        found = subprocess.check_output(ask, cwd=self.checkout, env=environment, text=True).strip()
        if not Path(found).is_relative_to(self.checkout):
            sys.exit(f"error: a run of {self.checkout} would import {found}")
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([*python, str(RANKS)], cwd=self.checkout, env=environment, **pipes)


def read(path: Path, out: Path) -> dict[str, Any]:
    """Returns tensors and numbers of a file in `out` by name."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pt":  # DeepSpeed's, with objects that equal only themselves
        tensors = {
            name: x
            for name, x in leaves(torch.load(path, weights_only=False))
            if isinstance(x, Tensor)
        }
        # DeepSpeed never writes the padding of the masters, which the adapter has without it.
        return {name: x for name, x in tensors.items() if "fp32_flat_groups" not in name}
    text = path.read_text().replace(str(out), "")
    if path.suffix == ".jsonl":
        records = [json.loads(line, parse_constant=str) for line in text.splitlines()]
        return dict(leaves([[record.get("loss"), record.get("grad_norm")] for record in records]))
    content = json.loads(text)
    return dict(leaves(content.get("perplexity") if path.name == "report.json" else content))


def leaves(content: Any) -> Iterator[tuple[str, Any]]:
    return ((keystr(place), leaf) for place, leaf in tree_flatten_with_path(content)[0])


def differences(old: Path, new: Path, patterns: Iterable[str]) -> Iterator[str]:
    """Yields the differences of two runs, the earliest result first."""
    for pattern in patterns:
        for path in sorted(
            {file.relative_to(out) for out in (old, new) for file in out.glob(pattern)}
        ):
            if not (old / path).exists() or not (new / path).exists():
                yield f"{path}: only in the {'reference' if (old / path).exists() else 'new run'}"
                continue
            ours, theirs = read(old / path, old), read(new / path, new)
            for name in sorted(ours.keys() | theirs.keys()):
                if difference := unequal(ours.get(name, MISSING), theirs.get(name, MISSING)):
                    yield f"{path} {name}: {difference}"


def unequal(old: Any, new: Any) -> str | None:
    """Tells how two tensors or numbers differ, None if all bits are equal."""
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return None if type(old) is type(new) and old == new else f"{old} became {new}"[:160]
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}"
    integer = INTEGERS[old.element_size()]
    if torch.equal(old.contiguous().view(integer), new.contiguous().view(integer)):
        return None
    return f"largest difference {(old.double() - new.double()).abs().max():.3g}"


def compare(case: Case, kept: Side, fresh: Side, patterns: Iterable[str]) -> str:
    """Runs a case with the new code. Compares it with the kept results and returns the verdict."""
    if failure := fresh.run(case):
        return f"failed: {failure}"
    try:
        found = list(differences(kept.root / case.folder, fresh.root / case.folder, patterns))
    except (OSError, ValueError, KeyError) as error:
        return f"a result cannot be read: {error!r}"
    if found:
        return f"{found[0]}   ({len(found)} differences)"
    shutil.rmtree(fresh.root / case.folder)
    return "equal"


def commit_of(checkout: Path) -> str:
    """Returns the commit of a checkout, which must have no changes."""
    git = ["git", "-C", str(checkout)]
    changes = subprocess.check_output(
        [*git, "status", "--porcelain", "--untracked-files=no"], text=True
    )
    if changes:
        sys.exit(f"error: the reference {checkout} has changes that are in no commit:\n{changes}")
    return subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--reference", type=Path, required=True, help="checkout whose results are right"
    )
    parser.add_argument(
        "--checkout", type=Path, default=ROOT, help="checkout to compare; default: this one"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help="for inputs and results; default: runs/same_results"
    )
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument(
        "--exports-only", action="store_true", help="not checkpoints, whose format may change"
    )
    parser.add_argument(
        "--reference-only",
        action="store_true",
        help="run no new side; keep the reference for later",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    reference, checkout, work = (
        p.resolve() for p in (arguments.reference, arguments.checkout, arguments.work)
    )
    kept = Side(reference, work, work / "reference" / commit_of(reference))
    make_inputs(work, reference)
    fresh = Side(checkout, work, Path(tempfile.mkdtemp(prefix="new-", dir=work)))
    cases, bad = [case for case in CASES if arguments.only in str(case)], 0
    for case in cases:
        began, verdict = time.monotonic(), "kept"
        if not (reference / case.needs).exists():
            verdict = f"skipped: the reference has no {case.needs}"
        elif not kept.has(case) and (failure := kept.run(case)):
            verdict = f"the reference failed: {failure}"
        elif not arguments.reference_only:
            verdict = compare(
                case, kept, fresh, RESULTS if arguments.exports_only else RESULTS + CHECKPOINTS
            )
        bad += not verdict.startswith(("equal", "kept", "skipped"))
        print(f"{case!s:<32}{time.monotonic() - began:>5.0f} s  {verdict}", flush=True)
    for side in (kept, fresh):
        side.close()
    print(f"{len(cases)} cases, {bad} not equal{f': see {fresh.root}' if bad else ''}")
    if not bad:
        shutil.rmtree(fresh.root)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
