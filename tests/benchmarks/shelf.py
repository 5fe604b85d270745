"""Compares the models of one run with several sizes and those of a run for each, of as many tokens.

    python -m tests.benchmarks.shelf --tune valid.txt --test test.raw [--other other.txt] [--work FOLDER]

SmolLM2-135M with repeated heads, the default recipe, one seed. A run of its own ends at one size, with the tokens that
the shelf had spent until then. With twice the steps only the last size is compared. The work folder keeps what is done.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json
from loraprune_ds.model.embedded import embedded_model_dir
from tests.benchmarks.quality import VALIDATION_WINDOWS, perplexity, prepare_texts, text_parser
from tests.benchmarks.quality_settings import BOTH, RATE
from tests.benchmarks.running import record, run_quickstart
from tests.benchmarks.two_four import expanded_model

SIZES = (0.2, 0.35, 0.5)
BUDGETS = ((64, 8, SIZES), (128, 16, SIZES[-1:]))  # steps of the cuts, those of each recovery, sizes to compare


def run(arguments: Namespace, name: str, *changes: str) -> dict[str, Any]:
    """Carries a run out, or the rest of it. Returns its report."""
    folder = arguments.work / name
    settings = [
        f"output_dir={folder}",
        f"model.path={expanded_model(embedded_model_dir(), arguments.work / 'expanded')}",
        f"data.path={arguments.tune.resolve()}",
        f"evaluate.max_windows={VALIDATION_WINDOWS}",
        "logging.report_to=[]",
        *BOTH,
        RATE,
        "train.global_batch_size=8",
        *changes,
    ]
    run_quickstart(1, settings, "--resume", "auto")
    return read_json(folder / "report.json")


def measured(arguments: Namespace, folder: Path, held_out: float) -> dict[str, float]:
    texts = {"test": arguments.test, "other": arguments.other}
    return {"held_out": held_out} | {name: perplexity(str(folder), text) for name, text in texts.items()}


def measure(arguments: Namespace, steps: int, recovery: int, compared: tuple[float, ...]) -> dict[str, Any]:
    """Carries out one budget's runs."""
    of_all = (f"train.recovery_steps={recovery}", f"prune.prune_every={steps // 16}")
    sizes = f"prune.sizes=[{','.join(map(str, SIZES))}]"
    name = f"shelf-{steps}"
    shelf = run(arguments, name, "prune.ratio=null", sizes, f"train.steps={steps}", *of_all)
    rows = list[dict[str, Any]]()
    for size in (size for size in shelf["shelf"] if float(size["size"]) in compared):
        alone_name, cuts = f"alone-{size['size']}-{steps}", size["step"] - recovery
        alone = run(arguments, alone_name, f"prune.ratio={size['size']}", f"train.steps={cuts}", *of_all)
        of_shelf = measured(arguments, arguments.work / name / size["folder"], size["perplexity"])
        of_its_own = measured(arguments, arguments.work / alone_name / "model", alone["perplexity"]["pruned"])
        row = {key: size[key] for key in ("size", "parameters", "kv_bytes_per_token", "tokens")}
        row |= {"parameters_alone": alone["params"]["pruned"], "shelf": of_shelf, "alone": of_its_own}
        rows.append(row | {"worse": {key: of_shelf[key] / of_its_own[key] - 1 for key in of_shelf}})
    tokens = {"shelf": rows[-1]["tokens"], "alone": sum(size["tokens"] for size in shelf["shelf"])}
    return {"rows": rows, "tokens": tokens | {"part": tokens["shelf"] / tokens["alone"]}}


def main() -> None:
    arguments = text_parser(__doc__, "shelf").parse_args()
    prepare_texts(arguments)
    record("shelf", {f"{budget[0]}+3x{budget[1]}": measure(arguments, *budget) for budget in BUDGETS})


if __name__ == "__main__":
    main()
