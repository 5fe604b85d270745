"""Measures perplexity, answers and tasks of each choice on SmolLM2-135M. Tokens and removed fraction are equal.

    python -m tests.benchmarks.quality --tune valid.txt --test test.raw [--other other.txt] [--work FOLDER]
                                       [--groups levers long ...] [--seeds 0 1 2] [--ranks 1]

One command makes the whole table, in hours. It reuses results in the work folder and in results/quality.json, unless
settings, texts or windows changed. An interrupted run goes on from its checkpoint. Table, picture and JSON are written
again after every run. `seconds` are those of steps and cuts on the machine of a run, so no row compares them.

A held-out tenth of the tuning text decided all choices. Test text and other text (by default Python's help topics) are
read only after a run.
"""

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json, read_text, write_json, write_text
from loraprune_ds.pretrained.sources import embedded_model_dir, embedded_text
from loraprune_ds.report.pictures import BLUE, GREEN, ORANGE, PURPLE, TEXT, VERMILION, picture
from loraprune_ds.report.records import read_history
from tests.benchmarks.expanded import expanded_model
from tests.benchmarks.quality_settings import GONE, GROUPS, SETTINGS, Setting, select
from tests.benchmarks.running import RESULTS, ROOT, evaluated, make_parser, run_base

WINDOWS, VALIDATION_WINDOWS = 160, 64
DENSE = "dense.json"
NO_LONGER = ("prune.compensate_steps", "prune.compensate_decay")  # of published runs


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--tune", type=Path, required=True, help="text to tune on; a tenth of it is held out"
    )
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument(
        "--other", type=Path, help="text of another kind; default: Python's help topics"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "quality", help="default: runs/quality"
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="settings by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--ranks", type=int, default=1, help="a micro-batch is a whole global batch of 8"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    chosen = select(arguments.groups, arguments.only)
    texts = prepare_texts(arguments)
    take_over(arguments.work)
    measure_dense(texts, arguments.work)
    for setting, seed in ((setting, seed) for seed in arguments.seeds for setting in chosen):
        path, basis = result_path(arguments.work, setting.name, seed), basis_of(setting, texts)
        if not path.exists() or read_json(path)["basis"] != basis:
            write_json(path, carry_out(setting, seed, texts, basis, arguments))
            publish(arguments.work)
    publish(arguments.work)


def basis_of(setting: Setting | None, texts: dict[str, Path]) -> dict[str, Any]:
    """Returns all that a result depends on, except its seed. Without a setting it is the dense model's."""
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in texts.items()}
    if setting is None:
        return {"texts": digests, "windows": WINDOWS}
    peer = {"peer": setting.peer} if setting.peer else {}
    return {
        "overrides": list(setting.overrides),
        "model": setting.model,
        **peer,
        "texts": digests,
        "windows": WINDOWS,
    }


def digest(basis: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:8]


def prepare_texts(arguments: argparse.Namespace) -> dict[str, Path]:
    """Prepares the text to tune on and the two texts for the end."""
    if arguments.other is None:
        arguments.other = arguments.work / "help_topics.txt"
        arguments.other.parent.mkdir(parents=True, exist_ok=True)
        topics = "\n\n".join(embedded_text())
        if not arguments.other.exists() or arguments.other.read_text(encoding="utf-8") != topics:
            # not again: another process may measure from the same folder
            write_text(arguments.other, topics)
    texts = {"tune": arguments.tune, "test": arguments.test, "other": arguments.other}
    for path in texts.values():
        read_text(path, "--text")  # finds all its errors before the first run
    return texts


def take_over(work: Path) -> None:
    """Takes over published results, perhaps from another machine, if their settings are today's or gone."""
    published = RESULTS / "quality.json"
    for run in read_json(published)["runs"] if published.exists() else []:
        name, setting = run["setting"], SETTINGS.get(run["setting"])
        overrides = [x for x in run["basis"]["overrides"] if not x.startswith(NO_LONGER)]
        if name in GONE or (setting and overrides == list(setting.overrides)):
            path = result_path(work, name, run["seed"])
            if not path.exists():
                write_json(path, run)


def measure_dense(texts: dict[str, Path], work: Path) -> None:
    """Measures the dense model on the two texts for the end. Writes into the work folder."""
    path, basis = work / DENSE, basis_of(None, texts)
    if not path.exists() or read_json(path)["basis"] != basis:
        measured = {name: perplexity("embedded", texts[name]) for name in ("test", "other")}
        write_json(path, {"basis": basis, "perplexity": measured, "writing": writing("embedded")})


def result_path(work: Path, setting: str, seed: int) -> Path:
    return work / "results" / f"{setting}-s{seed}.json"


def carry_out(
    setting: Setting,
    seed: int,
    texts: dict[str, Path],
    basis: dict[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One run to its end, and its perplexities."""
    print(f"{setting.name}, seed {seed} ...", file=sys.stderr, flush=True)
    model = embedded_model_dir()
    if setting.model != "gqa":
        model = expanded_model(model, arguments.work / "expanded")
    # other settings, another run
    folder = arguments.work / "runs" / f"{setting.name}-s{seed}-{digest(basis)}"
    settings = [
        f"output_dir={folder}",
        f"seed={seed}",
        f"model.path={model}",
        f"data.path={texts['tune'].resolve()}",
        f"evaluate.max_windows={VALIDATION_WINDOWS}",
        "checkpoint.every=20",
        "checkpoint.keep_last=1",
        "logging.report_to=[]",
        *setting.overrides,
    ]
    run_base(arguments.ranks, settings, "--resume", "auto", peer=setting.peer)
    report = read_json(folder / "report.json")
    measured = {name: perplexity(str(folder), texts[name]) for name in ("test", "other")}
    report["config"] |= {"output_dir": "run"}  # no folder of this machine
    report["config"]["model"] |= {"path": setting.model}
    report["config"]["data"] |= {"path": texts["tune"].name}
    history = read_history(folder / "metrics.jsonl")
    return {
        "setting": setting.name,
        "group": setting.group,
        "basis": basis,
        "seed": seed,
        "tokens": report["steps"]
        * report["config"]["train"]["global_batch_size"]
        * report["config"]["data"]["window"],
        "perplexity": {"validation": report["perplexity"]["pruned"], **measured},
        **({"writing": writing(str(folder))} if setting.answers else {}),
        # of the training alone
        "seconds": sum(record.seconds for record in (*history.steps, *history.cuts)),
        "report": report,
    }


def perplexity(model: str, text: Path) -> float:
    windows = ("--window", "128", "--max-windows", str(WINDOWS))
    return float(evaluated(model, "--text", str(text.resolve()), *windows)["perplexity"])


def writing(model: str) -> dict[str, float]:
    """Measures what a user judges a model by: greedy answers, closeness to the dense model on its own, and tasks."""
    answers = evaluated(model, "--dense", "embedded", "--answers")["answers"]
    greedy = {
        key: answers["greedy"][key] for key in ("tokens", "ended", "repetition", "dense_perplexity")
    }
    closeness = {key: answers["closeness"][key] for key in ("agreement", "overlap")}
    tasks = evaluated(model, "--tasks", "reasoning_gym")["measured"]
    return greedy | closeness | {"exact_match": tasks["values"]["exact match"]["value"]}


def publish(work: Path) -> None:
    """Writes table, picture and JSON from every run in the work folder."""
    names = [*SETTINGS, *GONE]
    runs = [
        run
        for path in (work / "results").glob("*.json")
        if (run := read_json(path))["setting"] in names
    ]
    runs.sort(key=lambda run: (names.index(run["setting"]), run["seed"]))
    rows = rows_of(runs)
    dense = read_json(work / DENSE)
    write_json(RESULTS / "quality.json", {"dense": dense, "rows": rows, "runs": runs})
    draw(RESULTS / "quality.png", rows, dense["perplexity"])


# Table and picture

LINES = {  # setting -> colour, marker, words of the legend
    "plain": (ORANGE, "o", "lora (plain)"),
    "recipe": (GREEN, "^", "the default recipe"),
    "fisher-refit-4-steps": (BLUE, "D", "fisher, refit"),
    "fisher-refit-distillation-global-4-steps": (
        PURPLE,
        "v",
        "fisher, refit, 1/2 distillation, global",
    ),
    "general-0.25-temperature-2": (VERMILION, "s", "fisher, refit, 1/4 distillation, global"),
}
PANELS = (  # what the axis shows, the suffixes of the settings elsewhere on it, its label and ticks
    (
        "tokens",
        ("-409600",),
        "tokens of training, 41.7 % removed",
        {81_920: "81,920", 409_600: "409,600"},
    ),
    (
        "removed_linear_fraction",
        ("-light", "-15", "-30", "-half"),
        "removed, 81,920 tokens",
        {0.148: "14.8 %", 0.3: "30 %", 0.417: "41.7 %", 0.5: "50 %"},
    ),
)
TEXTS_DRAWN = {"test": "WikiText-2 test (dashed: dense)", "other": "other text (dashed: dense)"}
TICKS = {
    "test": (25, 30, 40, 50, 60, 80, 100, 150, 200),
    "other": (25, 50, 100, 200, 400, 800, 1600),
}
TEXTS = ("validation", "test", "other")
Row = dict[str, Any]


def rows_of(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """Builds one row per setting: mean and spread (largest minus smallest) of each measurement over its seeds.

    Older runs have no answers and tasks (`writing`).
    """
    names = list(dict.fromkeys(run["setting"] for run in runs))
    return [_row([run for run in runs if run["setting"] == name]) for name in names]


def _row(runs: list[dict[str, Any]]) -> Row:
    linears = runs[0]["report"]["measured"]["values"]["linear parameters"]
    written = [run["writing"] for run in runs if "writing" in run]
    return {
        "setting": runs[0]["setting"],
        "group": runs[0]["group"],
        "seeds": [run["seed"] for run in runs],
        "tokens": runs[0]["tokens"],
        "removed_linear_fraction": 1 - linears["value"] / linears["dense"],
        **{text: _spread([run["perplexity"][text] for run in runs]) for text in TEXTS},
        "writing": {key: statistics.mean(run[key] for run in written) for key in written[0]}
        if written
        else None,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "spread": max(values) - min(values)}


def draw(path: Path, rows: Sequence[Row], dense: dict[str, float]) -> None:
    """Draws few settings: perplexity on both texts against the tokens, and against the removed fraction.

    A point is the mean over the seeds, its bar the spread. Dashed lines are the dense model.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    by_name = {row["setting"]: row for row in rows}
    with picture(path, (10, 7.2)) as figure:
        panels = figure.subplots(2, 2, sharey="row")
        for (text, heading), line in zip(TEXTS_DRAWN.items(), panels, strict=True):
            for axes, (key, suffixes, label, ticks) in zip(line, PANELS, strict=True):
                for name, (colour, marker, words) in LINES.items():
                    names = (name + suffix for suffix in ("", *suffixes))
                    points = sorted(
                        (by_name[n] for n in names if n in by_name), key=lambda row: row[key]
                    )
                    axes.errorbar(
                        [row[key] for row in points],
                        [row[text]["mean"] for row in points],
                        yerr=[row[text]["spread"] / 2 for row in points],
                        color=colour,
                        marker=marker,
                        label=words,
                    )
                axes.axhline(dense[text], linestyle="--", linewidth=1, color=TEXT)
                axes.set(xscale="log", yscale="log", title=heading, xlabel=label)
                axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
                axes.set_xticklabels(list(ticks.values()))
                axes.yaxis.set_major_locator(FixedLocator(list(TICKS[text])))
                axes.yaxis.set_major_formatter("{x:g}")
                for axis in (axes.xaxis, axes.yaxis):
                    axis.set_minor_locator(NullLocator())
            line[0].set_ylabel("perplexity, log scale")
        figure.legend(
            *panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3
        )


if __name__ == "__main__":
    main()
