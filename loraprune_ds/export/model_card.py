"""Writes README.md of an exported model: its cut, its perplexity, and how to load it.

On the hub the measured results are also the card's `model-index`. The token for a push is `HF_TOKEN`, or the stored one
of `hf auth login`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, get_token
from huggingface_hub import ModelCard as HubCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from loraprune_ds.checkpoint.layout import recorded_config
from loraprune_ds.checkpoint.load import TrainingCheckpoint, keep_from_lists
from loraprune_ds.checkpoint.state import State
from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, first_line, require
from loraprune_ds.export.gguf_architecture import architecture_name
from loraprune_ds.files import CARD_FILE, STATE_FILE, JsonObject, read_json
from loraprune_ds.model.groups import QUERY_HEADS
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.exported_config import ExportedConfig
from loraprune_ds.pretrained.sources import EMBEDDED, HUB_ERRORS
from loraprune_ds.report.measured import Measured, Value, read_measured
from loraprune_ds.report.records import REPORT_FILE
from loraprune_ds.units import format_percent, format_perplexity

TITLES = {
    "heads": "key-value heads",
    QUERY_HEADS: "key-value heads",  # which stay. Their query heads have a column of their own
    "delta": "key heads of delta nets",
    "cross_heads": "heads of cross-attention",
    "channels": "MLP channels",
    "experts": "experts",
}
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSeq2SeqLM": "text2text-generation",
}
LOAD_HEADING = "## Load it"
SHOWN = 5  # answers
TEMPLATES = Environment(  # the .txt files of this folder
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class ModelCard:
    """The facts of the README. Names contain no path of this machine. A perplexity that was not measured is None."""

    base_model: str
    dense: ModelShape
    pruned: ModelShape
    prune: PruneConfig
    asked: float  # fraction of the decoder layers' linears that was to leave
    data: str  # the training data
    steps: int
    perplexity_data: str
    perplexity_dense: float | None = None
    perplexity_pruned: float | None = None


def card_of_step(
    checkpoint: TrainingCheckpoint, windows: int | None = None, perplexity: float | None = None
) -> ModelCard:
    """Collects the facts of a run at a step, like `card_of_state`."""
    return card_of_state(checkpoint.state, checkpoint.dense.shape, windows, perplexity)


def card_of_state(
    state: State, dense: ModelShape, windows: int | None = None, perplexity: float | None = None
) -> ModelCard:
    """Collects the facts of a training under pruning.

    Args:
        windows: the measured number of windows, if known.
        perplexity: measured on the export. Default: the one at this step, if it was measured.
    """
    origin = state.origin
    config = recorded_config(origin.config, Path(STATE_FILE))
    kept = keep_from_lists(state.kept, dense.kinds)
    data = "data of its own trainer"
    perplexity_data = "not measured"
    if origin.data is not None:
        paths = [source.path for source in config.data.sources]
        data = " + ".join(
            "Python's help topics (pydoc_data)" if path == EMBEDDED else Path(path).name
            for path in paths
        )
        held_out = f"a held-out part of {data}"
        if config.data.held_out:
            held_out = Path(config.data.held_out).name
        count = "" if windows is None else f"{windows} "
        perplexity_data = f"{held_out}, {count}windows of {config.evaluate.window} tokens"
    return ModelCard(
        base_model=dense.first.get("name") or model_name(config.model.path),
        dense=dense,
        pruned=dense.after(kept),
        prune=config.prune,
        asked=state.asked,
        data=data,
        steps=state.step,
        perplexity_data=perplexity_data,
        perplexity_dense=state.totals.perplexity_dense,
        perplexity_pruned=state.totals.perplexity if perplexity is None else perplexity,
    )


def model_name(path: str) -> str:
    """Names the dense model, without folders of this machine."""
    return "SmolLM2-135M-Instruct" if path == EMBEDDED else Path(path).name


def write_model_card(folder: Path, card: ModelCard, exported: ExportedConfig) -> None:
    """Writes README.md of the exported model in `folder`."""
    text = TEMPLATES.get_template("model_card.txt").render(
        card=card,
        exported=exported,
        percent=format_percent,
        perplexity=format_perplexity,
        others=TITLES[card.pruned.kinds[-1]],
        architecture=architecture_name(exported.config, card.pruned),
        layers="\n".join(_layer_rows(card.pruned)),
        task=TASKS[exported.auto_class],
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def copy_model_card(source: Path, folder: Path, how_to_load: str) -> None:
    """Copies the model card of `source`, if any, with another section on loading."""
    path = source / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    facts = text.partition(LOAD_HEADING)[0].rstrip()
    (folder / CARD_FILE).write_text(
        f"{facts}\n\n{LOAD_HEADING}\n\n{how_to_load}".lstrip(), encoding="utf-8"
    )


def answers_section(result: JsonObject) -> str:
    """Makes a section with a few greedy answers from an evaluation, over all kinds of prompts."""
    count = len(result["answers_plan"]["prompts"])
    shown = sorted({i * count // SHOWN for i in range(SHOWN)})
    return TEMPLATES.get_template("answers.txt").render(result=result, shown=shown)


def check_push(repo: str, results: Sequence[Path]) -> None:
    """Checks a push before the export is made."""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise UserError(f"--push-to-hub {repo}: {first_line(error)}") from None
    require(repo.count("/") == 1, f"--push-to-hub {repo}: give it as OWNER/NAME")
    require(
        get_token() is not None, "--push-to-hub needs a token: set HF_TOKEN, or run `hf auth login`"
    )
    for path in results:
        read_measured(read_json(path), path)


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
    pruned: list[EvalResult] = []
    dense: list[EvalResult] = []
    answered = None
    report = run / REPORT_FILE
    for path in [report, *results] if report.is_file() else results:
        result = read_json(path)
        measured = read_measured(result, path)
        pruned += _results(measured, lambda value: value.value)
        dense += _results(measured, lambda value: value.dense)
        if result.get("answers"):
            answered = answered or result
    card = HubCard.load(card_file)
    index = eval_results_to_model_index(name, pruned) if pruned else []
    index += eval_results_to_model_index(f"{name}, dense", dense) if dense else []
    card.data["model-index"] = index or None
    if answered:
        before, heading, after = card.text.partition(LOAD_HEADING)
        card.text = f"{before.rstrip()}\n\n{answers_section(answered)}{heading}{after}"
    card.save(card_file)


def _layer_rows(shape: ModelShape) -> list[str]:
    """Makes a table with a row per sequence of equal layers, such as "| 0–3 | 32 | 8 | 11008 |"."""
    titles = ["layers", "query heads", *(TITLES[kind] for kind in shape.kinds)]
    rows = [_row(titles), "|---" * len(titles) + "|"]
    layers = range(len(shape.layers))
    for counts, equal_layers in groupby(layers, key=shape.counts.__getitem__):
        first, *rest = equal_layers
        name = f"{first}–{rest[-1]}" if rest else first
        cells = [name, shape.attention[first].queries]
        for kind, count in counts.items():
            if kind == QUERY_HEADS:
                count = shape.layers[first].key_value_heads
            cells.append(count)
        rows.append(_row(cells))
    return rows


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _results(
    measured: Measured, number_of: Callable[[Value], float | None]
) -> Iterator[EvalResult]:
    """Yields what was measured of the pruned or of the dense model. Its text is named without folders."""
    for name, value in measured.values.items():
        number = number_of(value)
        if value.basis and number is not None:
            text = " ".join(Path(word).name for word in value.basis.split())
            yield EvalResult("text-generation", text, text, name, number, metric_name=name)
