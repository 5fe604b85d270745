"""Pushes an export to the hub, with the measured results as the `model-index` of its card.

The token is `HF_TOKEN`, or the stored one of `hf auth login`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, get_token
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id

from loraprune_ds.checkpoint.layout import REPORT_FILE
from loraprune_ds.errors import UserError, first_line, require
from loraprune_ds.export.model_card import CARD_FILE, LOAD_HEADING, answers_section
from loraprune_ds.files import read_json
from loraprune_ds.model.hub import HUB_ERRORS


def check_push(repo: str, results: Sequence[Path]) -> None:
    """Checks a push before the export is made."""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"--push-to-hub {repo}: {first_line(error)}") from None
    require(repo.count("/") == 1, f"--push-to-hub {repo}: give it as OWNER/NAME")
    require(get_token() is not None, "--push-to-hub needs a token: set HF_TOKEN, or run `hf auth login`")
    for path in results:
        require({"perplexity", "tasks", "dense"} <= read_json(path).keys(), f"{path} is not from launch/evaluate.py")


def push(folder: Path, repo: str, run: Path, results: Sequence[Path], *, private: bool) -> str:
    """Adds the results to the card of the export, and uploads the export. Returns the address.

    Args:
        run: folder of the run, for the perplexities of its report. Any other folder has none.
        results: files from launch/evaluate.py --json.
    """
    api = HfApi()
    write_model_index(folder / CARD_FILE, repo.rpartition("/")[2], run, results)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a pruned model")
    except HUB_ERRORS as error:
        raise UserError(f"--push-to-hub {repo}: {first_line(error)}") from None
    return str(url)


def write_model_index(card_file: Path, name: str, run: Path, results: Sequence[Path]) -> None:
    """Writes the measured results of the pruned and the dense model into the card's `model-index`, and answers."""
    pruned, dense = list[EvalResult](), list[EvalResult]()
    if (run / REPORT_FILE).is_file():
        report = read_json(run / REPORT_FILE)
        pruned += _run_results(report, "pruned")
        dense += _run_results(report, "dense")
    measured_by = [read_json(path) for path in results]
    for result in measured_by:
        pruned += _evaluation_results(result, result)
        dense += _evaluation_results(result, result["dense"] or {})
    card = ModelCard.load(card_file)
    index = eval_results_to_model_index(name, pruned) if pruned else []
    index += eval_results_to_model_index(f"{name}, dense", dense) if dense else []
    card.data["model-index"] = index or None
    answered = next((result for result in measured_by if result.get("answers")), None)
    if answered:
        before, heading, after = card.text.partition(LOAD_HEADING)
        card.text = f"{before.rstrip()}\n\n{answers_section(answered)}\n{heading}{after}"
    card.save(card_file)


def _run_results(report: dict[str, Any], which: str) -> Iterator[EvalResult]:
    value, config = report["perplexity"][which], report["config"]
    if value is not None:
        source = config["data"]["held_out"] or config["data"]["path"]
        paths = [source] if isinstance(source, str) else [entry["path"] for entry in source]  # a mixture
        text = " + ".join(Path(path).name for path in paths)
        yield _perplexity(value, text, config["evaluate"]["window"])


def _evaluation_results(result: dict[str, Any], model: dict[str, Any]) -> Iterator[EvalResult]:
    if model.get("perplexity") is not None:
        yield _perplexity(model["perplexity"], result["text"]["name"], result["protocol"]["window"])
    for task, metrics in ((model.get("tasks") or {}).get("results") or {}).items():
        for metric, value in metrics.items():
            name, _, variant = metric.partition(",")
            if variant and not name.endswith("_stderr") and isinstance(value, int | float):
                harness = "reasoning-gym" if task.startswith("reasoning_gym:") else "lm-eval"
                yield _result(task, name, value, f"{name} ({variant}), {harness}")


def _perplexity(value: float, text: str, window: int | None) -> EvalResult:
    how = f", windows of {window} tokens" if window else ""
    return _result(text, "perplexity", round(value, 4), f"perplexity{how}")


def _result(dataset: str, metric: str, value: float, name: str) -> EvalResult:
    return EvalResult("text-generation", dataset, dataset, metric, value, metric_name=name)
