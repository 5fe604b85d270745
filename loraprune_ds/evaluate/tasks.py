"""Tasks by name. Those with its prefix come from reasoning-gym, all others from EleutherAI's lm-evaluation-harness.

reasoning-gym makes questions with checkable answers, and scores the answers. lm-eval asks them. Both packages are
optional, and imported only when used.
"""

import importlib
import logging
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.evaluate.settings import GYM, TaskSettings, did_you_mean
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.generate.writer import Writer
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.versions import check_installed

Question = dict[str, Any]  # of reasoning-gym: its question, answer and metadata
# task -> metric -> value, and settings for the result
ResultsAndSettings = tuple[JsonObject, JsonObject]
# The seven of the LoRAPrune paper (Zhang et al., Findings of ACL 2024), by their names in lm-eval.
PAPER_TASKS = (
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
LM_EVAL_SETTINGS = (
    "random_seed",
    "numpy_seed",
    "torch_seed",
    "fewshot_seed",
    "limit",
    "batch_size",
)
# Of 39 tasks of reasoning-gym SmolLM2-135M-Instruct solves these above 20 %, and better than the best constant answer:
# tests/benchmarks/results/reasoning_gym.json
GYM_DEFAULT = ("number_sequence", "number_sequence:easy", "products:easy")
# names for several tasks
SETS = {"paper": PAPER_TASKS, GYM: tuple(f"{GYM}:{name}" for name in GYM_DEFAULT)}
EASY = "easy"  # the level that may follow a name
FEWSHOT = 3  # examples before a question
QUESTIONS = 100
SEED = 0  # question i has the seed SEED + i
EXAMPLES_SEED = 10**6  # far from the seeds of the questions
ROOM = 8  # tokens beyond the characters of the longest right answer
# of reasoning-gym, with the reasons
REFUSED_TASKS = read_json(Path(__file__).with_name("refused_tasks.json"))


def check_tasks(settings: TaskSettings) -> None:
    """Checks that the packages are installed and can load all tasks. Raises UserError with the first that fails."""
    check_installed("lm_eval", "--tasks", "'lm-eval[hf]'")
    folder = settings.include_path
    require(folder is None or folder.is_dir(), f"--include-path: {folder} is not a folder")
    gym, others = _split(settings)
    available = _task_manager(folder).all_tasks if others else ()
    for name in others:
        is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
        if name not in available and not is_file:
            hint = did_you_mean(name, available) or "; see `lm-eval ls tasks`"
            raise UserError(f"--tasks: lm-eval knows no task {name}{hint}")
    _gym_tasks(gym, settings)


def run_tasks(
    settings: TaskSettings, writer: Writer, batch_size: int, comm: Communicator
) -> JsonObject | None:
    """Runs all tasks. Collective.

    Returns:
        On rank 0 {"results": {task: {metric: value}}, "settings": …}, with lm-eval's metric names, and
        reasoning-gym's settings under its name. None elsewhere.
    """
    gym, others = _split(settings)
    results: JsonObject = {}
    reported: JsonObject = {}
    model = _model_on_ranks(writer, batch_size, comm)
    if others:
        results, reported = _run_lm_eval(others, settings, model)
    if gym:
        templated = bool(writer.tokenizer.chat_template)
        tasks = _gym_tasks(gym, settings)
        gym_results, about = _run_lm_eval(tasks, settings, model, templated=templated)
        results |= gym_results
        reported[GYM] = about | {GYM: version("reasoning-gym")}
    return {"results": results, "settings": reported} if comm.rank == 0 else None


def _split(settings: TaskSettings) -> tuple[list[str], list[str]]:
    """Returns the names of reasoning-gym's tasks and of lm-eval's. No task is repeated."""
    names: dict[str, None] = {}
    for name in settings.names:
        names |= dict.fromkeys(SETS.get(name, (name,)))
    prefix = f"{GYM}:"
    gym = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return gym, [name for name in names if not name.startswith(prefix)]


def _gym_tasks(names: list[str], settings: TaskSettings) -> list[Any]:
    if names:
        check_installed("reasoning_gym", f"--tasks {GYM}", "reasoning-gym")
    fewshot = FEWSHOT if settings.fewshot is None else settings.fewshot
    return [gym_task(name, fewshot, settings.limit or QUESTIONS) for name in names]


def _run_lm_eval(
    tasks: list[Any], settings: TaskSettings, model: Any, *, templated: bool = False
) -> ResultsAndSettings:
    """Runs the tasks. Rank r takes documents r, r + world_size, and so on. Empty but on rank 0. Collective."""
    try:
        answer = _lm_eval("").simple_evaluate(
            model,
            tasks=tasks,
            task_manager=_task_manager(settings.include_path),
            num_fewshot=settings.fewshot,
            batch_size=model.batch_size,
            limit=settings.limit,
            log_samples=False,
            apply_chat_template=templated,
            fewshot_as_multiturn=templated,
        )
    except Exception as error:  # a task file can hold any code, and `datasets` raises anything
        raise UserError(f"--tasks {' '.join(settings.names)}: {one_line(error)}") from error
    if answer is None:
        return {}, {}
    reported = {
        "lm_eval": answer["lm_eval_version"],
        "fewshot": answer["n-shot"],
        "versions": answer["versions"],
        "documents": {task: count["effective"] for task, count in answer["n-samples"].items()},
        "max_length": answer["max_length"],
        "chat_template": answer.get("chat_template"),
        **{key: answer["config"].get(key) for key in LM_EVAL_SETTINGS},
    }
    return answer["results"], reported


def _model_on_ranks(writer: Writer, batch_size: int, comm: Communicator) -> Any:
    """Wraps a loaded model for lm-eval, which deals documents out to ranks only under `accelerate launch`."""
    backend = "seq2seq" if writer.model.config.is_encoder_decoder else "causal"
    base: Any = _lm_eval(".models.huggingface").HFLM
    model = base(
        writer.model,
        backend,
        tokenizer=writer.tokenizer,
        batch_size=batch_size,
        enable_thinking=False,
    )
    encode = model.tok_batch_encode

    def encode_whole(texts: list[str], *, left_truncate_len: int, **options: Any) -> Any:
        """Encodes the prompts of a batch. lm-eval would cut a long one from the left."""
        ids, mask = encode(texts, **options)
        length = ids.shape[1]
        require(
            length <= left_truncate_len,
            f"a prompt has {length} tokens, and only {left_truncate_len} leave room for an answer; lower --num-fewshot",
        )
        return ids, mask

    model.tok_batch_encode = encode_whole
    model._rank = comm.rank
    model._world_size = comm.world_size
    # a scalar from each: (world_size,)
    model.all_gather = lambda tensor: comm.all_gather(tensor.view(1)).flatten()
    model.barrier = comm.barrier
    return model


@cache
def _task_manager(include_path: Path | None) -> Any:
    """Makes lm-eval's index of all task files, which takes seconds."""
    return _lm_eval(".tasks").TaskManager(include_path=include_path)


def _lm_eval(module: str) -> Any:
    """Imports a module of lm-eval without its warnings. It may not be installed where types are checked."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return importlib.import_module(f"lm_eval{module}")


@cache
def gym_task(name: str, fewshot: int, count: int) -> Any:
    """Makes a task of lm-eval from `name`, such as "products" or "products:easy", of reasoning-gym.

    Raises:
        UserError: the task is unknown or cannot be loaded.
    """
    dataset, questions, examples = _make_questions(name, fewshot, count)

    def score(row: JsonObject, answers: list[str]) -> JsonObject:
        """Returns the package's own score, from 0 to 1, and whether it is full."""
        try:
            value = float(dataset.score_answer(answers[0].strip(), questions[row["number"]]))
        except Exception:  # noqa: BLE001  # some scorers raise at an answer that they cannot read
            value = 0.0
        return {"exact_match": float(value >= 1), "score": value}

    def rows(entries: list[Question]) -> list[JsonObject]:
        keys = ("question", "answer")
        return [{"number": i, **{key: x[key] for key in keys}} for i, x in enumerate(entries)]

    mean = {"aggregation": "mean", "higher_is_better": True}
    longest = max(len(entry["answer"]) for entry in questions)
    config = {
        "task": f"{GYM}:{name}",
        "custom_dataset": lambda: {"test": Dataset.from_list(rows(questions))},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "\n",
        "fewshot_config": {"sampler": "first_n", "samples": rows(examples)},
        "num_fewshot": fewshot,
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": longest + ROOM},
        "process_results": score,
        "metric_list": [{"metric": metric, **mean} for metric in ("exact_match", "score")],
    }
    return _lm_eval(".api.task").ConfigurableTask(config=config)


def _make_questions(
    name: str, fewshot: int, count: int
) -> tuple[Any, list[Question], list[Question]]:
    """Makes the data set, the questions and the examples before each question."""
    factory: Any = importlib.import_module("reasoning_gym.factory")
    task, _, level = name.partition(":")
    option = f"--tasks {GYM}:{name}"
    require(task not in REFUSED_TASKS, f"{option}: {REFUSED_TASKS.get(task)}")
    if task not in factory.DATASETS:
        hint = did_you_mean(task, factory.DATASETS.keys() - REFUSED_TASKS.keys())
        raise UserError(f"--tasks: reasoning-gym knows no task {task}{hint}")
    require(level in ("", EASY), f"{option}: only :{EASY} may follow the name of a task")

    def make(seed: int, size: int) -> Any:
        if not level:
            return factory.create_dataset(task, seed=seed, size=size)
        # the first level of its curriculum
        curriculum = factory.create_curriculum(task)
        settings = curriculum.generate_configuration({"seed": seed, "size": size})
        return factory.DATASETS[task][0](settings)

    try:
        dataset = make(SEED, count)
        candidates = make(EXAMPLES_SEED, 4 * fewshot + 8)
        questions = [dataset[i] for i in range(count)]
        texts = {entry["question"] for entry in questions}
        others = [candidates[i] for i in range(len(candidates))]
    except Exception as error:  # a task may need more settings, and its generator raises anything
        raise UserError(f"{option}: {one_line(error)}") from error
    examples = [entry for entry in others if entry["question"] not in texts]
    require(
        all(isinstance(entry["answer"], str) for entry in (*questions, *examples)),
        f"{option}: its questions have no right answer for the examples",
    )
    require(
        len(examples) >= fewshot,
        f"{option}: it has too few different questions; lower --num-fewshot or --limit",
    )
    return dataset, questions, examples[:fewshot]
