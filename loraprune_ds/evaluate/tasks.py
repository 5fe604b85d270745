"""Tasks by name. Those with its prefix come from reasoning-gym, all others from EleutherAI's lm-evaluation-harness.

reasoning-gym makes questions with checkable answers, and scores the answers. Both packages are optional, and imported
only when used.
"""

import hashlib
import importlib
import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.evaluate.settings import GYM, TaskSettings, did_you_mean
from loraprune_ds.files import read_json
from loraprune_ds.generate.encoding import encode_prompts
from loraprune_ds.generate.prompts import AnswerSettings, Message, Prompt
from loraprune_ds.generate.writer import Writer
from loraprune_ds.ranks.comm import Communicator

# task -> metric -> value, and settings for the result
ResultsAndSettings = tuple[dict[str, Any], dict[str, Any]]
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
FEWSHOT, QUESTIONS = 3, 100
# Question i has the seed SEED + i, so the seed of the examples must be far away.
SEED, EXAMPLES_SEED = 0, 10**6
ROOM = 8  # tokens beyond the longest right answer
# of reasoning-gym, with the reasons
REFUSED_TASKS = read_json(Path(__file__).with_name("refused_tasks.json"))


def check_tasks(settings: TaskSettings) -> None:
    """Checks that the packages are installed and can load all tasks. Raises UserError with the first that fails."""
    gym, others = _split(settings)
    require(
        bool(others.names) or settings.include_path is None,
        f"--include-path has no effect on tasks of {GYM}",
    )
    if gym.names:
        load_tasks(gym)
    if not others.names:
        return
    found = importlib.util.find_spec("lm_eval") is not None
    require(found, "--tasks needs the package lm-eval: pip install 'lm-eval[hf]'")
    folder = settings.include_path
    require(folder is None or folder.is_dir(), f"--include-path: {folder} is not a folder")
    known = _task_manager(folder).all_tasks
    for name in _expand(others.names):
        if name not in known and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            hint = did_you_mean(name, known) or "; see `lm-eval ls tasks`"
            raise UserError(f"--tasks: lm-eval knows no task {name}{hint}")


def run_tasks(
    settings: TaskSettings, writer: Writer, batch_size: int, comm: Communicator
) -> dict[str, Any] | None:
    """Runs all tasks. Collective.

    Returns:
        On rank 0 {"results": {task: {metric: value}}, "settings": …}, with lm-eval's metric names, and
        reasoning-gym's settings under its name. None elsewhere.
    """
    gym, others = _split(settings)
    results, reported = _run_lm_eval(others, writer, batch_size, comm) if others.names else ({}, {})
    if gym.names:
        solved, reported_of_gym = _run_gym(gym, writer, batch_size, comm)
        results, reported = results | solved, reported | {GYM: reported_of_gym}
    return {"results": results, "settings": reported} if comm.rank == 0 else None


def _split(settings: TaskSettings) -> tuple[TaskSettings, TaskSettings]:
    """Returns the settings of reasoning-gym's tasks and of lm-eval's."""
    gym = tuple(name for name in settings.names if name.partition(":")[0] == GYM)
    others = tuple(name for name in settings.names if name not in gym)
    return replace(settings, names=gym, include_path=None), replace(settings, names=others)


def _run_lm_eval(
    settings: TaskSettings, writer: Writer, batch_size: int, comm: Communicator
) -> ResultsAndSettings:
    """Runs the tasks. Rank r takes documents r, r + world_size, and so on. Empty but on rank 0. Collective."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        answer = _lm_eval("").simple_evaluate(
            _model_on_ranks(writer, batch_size, comm),
            tasks=list(_expand(settings.names)),
            task_manager=_task_manager(settings.include_path),
            num_fewshot=settings.fewshot,
            batch_size=batch_size,
            limit=settings.limit,
            log_samples=False,
        )
    except Exception as error:  # a task file can hold any code, and `datasets` raises anything
        raise UserError(f"--tasks {' '.join(settings.names)}: {one_line(error)}") from error
    if comm.rank != 0:
        return {}, {}
    reported = {
        "lm_eval": answer["lm_eval_version"],
        "fewshot": answer["n-shot"],
        "versions": answer["versions"],
        "documents": answer["n-samples"],
        "max_length": answer["max_length"],
        "chat_template": answer.get("chat_template"),
        **{key: answer["config"].get(key) for key in LM_EVAL_SETTINGS},
    }
    return answer["results"], reported


def _model_on_ranks(writer: Writer, batch_size: int, comm: Communicator) -> Any:
    """Wraps a loaded model for lm-eval, which deals documents out to ranks only under `accelerate launch`."""
    backend = "seq2seq" if writer.model.config.is_encoder_decoder else "causal"
    base: Any = _lm_eval(".models.huggingface").HFLM
    made = base(writer.model, backend, tokenizer=writer.tokenizer, batch_size=batch_size)
    made._rank, made._world_size = comm.rank, comm.world_size
    # a scalar from each: (world_size,)
    made.all_gather = lambda tensor: comm.all_gather(tensor.view(1)).flatten()
    made.barrier = comm.barrier
    return made


def _expand(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(task for name in names for task in SETS.get(name, (name,))))


@cache
def _task_manager(include_path: Path | None) -> Any:
    """Makes lm-eval's index of all task files, which takes seconds."""
    return _lm_eval(".tasks").TaskManager(include_path=include_path)


def _lm_eval(module: str) -> Any:
    """Imports a module of lm-eval, which may not be installed where types are checked."""
    return importlib.import_module(f"lm_eval{module}")


@dataclass(frozen=True)
class GymTask:
    """A task with its questions: dictionaries of reasoning-gym with `question`, `answer` and `metadata`."""

    name: str  # as in the results
    dataset: Any
    questions: list[dict[str, Any]]
    examples: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        """Returns the SHA-256 of all that is asked. Only results with equal digests are comparable."""
        asked = [entry["question"] for entry in (*self.examples, *self.questions)]
        return hashlib.sha256("\0".join(asked).encode()).hexdigest()

    def score(self, answer: str, question: dict[str, Any]) -> float:
        """Returns the package's own score, from 0 to 1."""
        try:
            return float(self.dataset.score_answer(answer, question))
        except Exception:  # noqa: BLE001  # some scorers raise at an answer that they cannot read
            return 0.0


@cache
def load_tasks(settings: TaskSettings) -> tuple[GymTask, ...]:
    """Makes the questions of all tasks. Raises UserError for a task that is unknown or cannot be loaded."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(f"--tasks {GYM} needs the package reasoning-gym: pip install reasoning-gym")
    names = [name.removeprefix(f"{GYM}:") for name in _expand(settings.names)]
    fewshot = FEWSHOT if settings.fewshot is None else settings.fewshot
    return tuple(_load(name, fewshot, settings.limit or QUESTIONS) for name in names)


def _load(name: str, fewshot: int, count: int) -> GymTask:
    known: Any = importlib.import_module("reasoning_gym.factory")
    task, _, level = name.partition(":")
    require(task not in REFUSED_TASKS, f"--tasks {GYM}:{name}: {REFUSED_TASKS.get(task)}")
    if task not in known.DATASETS:
        hint = did_you_mean(task, known.DATASETS.keys() - REFUSED_TASKS.keys())
        raise UserError(f"--tasks: reasoning-gym knows no task {task}{hint}")
    require(
        level in ("", EASY), f"--tasks {GYM}:{name}: only :{EASY} may follow the name of a task"
    )

    def make(seed: int, size: int) -> Any:
        if level:  # the first level of its curriculum
            settings = known.create_curriculum(task).generate_configuration(
                {"seed": seed, "size": size}
            )
            return known.DATASETS[task][0](settings)
        return known.create_dataset(task, seed=seed, size=size)

    try:
        dataset, more = make(SEED, count), make(EXAMPLES_SEED, 4 * fewshot + 8)
        questions = [dataset[i] for i in range(count)]
        asked = {entry["question"] for entry in questions}
        examples = [
            entry
            for entry in map(more.__getitem__, range(len(more)))
            if entry["question"] not in asked
        ]
    except Exception as error:  # a task may need more settings, and its generator raises anything
        raise UserError(f"--tasks {GYM}:{name}: {one_line(error)}") from error
    answered = all(isinstance(entry["answer"], str) for entry in (*questions, *examples))
    require(answered, f"--tasks {GYM}:{name}: its questions have no right answer for the examples")
    few = (
        f"--tasks {GYM}:{name}: it has too few different questions; lower --num-fewshot or --limit"
    )
    require(len(examples) >= fewshot, few)
    return GymTask(f"{GYM}:{name}", dataset, questions, examples[:fewshot])


def _run_gym(
    settings: TaskSettings, writer: Writer, batch_size: int, comm: Communicator
) -> ResultsAndSettings:
    """Runs the tasks. Rank r takes batches r, r + world_size, and so on. Collective."""
    tasks = load_tasks(settings)
    results = {}
    for task in tasks:
        answers = greedy_answers(task, writer, batch_size, comm)
        scores = [
            task.score(answer, question)
            for answer, question in zip(answers, task.questions, strict=True)
        ]
        share = sum(score >= 1 for score in scores) / len(scores)  # of full scores
        error = math.sqrt(share * (1 - share) / max(1, len(scores) - 1))
        mean = sum(scores) / len(scores)
        results[task.name] = {
            "exact_match,none": share,
            "exact_match_stderr,none": error,
            "score,none": mean,
        }
    reported = {
        "reasoning_gym": version("reasoning-gym"),
        "fewshot": len(tasks[0].examples),
        "documents": {task.name: len(task.questions) for task in tasks},
        "sha256": {task.name: task.digest for task in tasks},
        "seed": SEED,
        "chat_template": bool(writer.tokenizer.chat_template),
    }
    return results, reported


def greedy_answers(task: GymTask, writer: Writer, batch_size: int, comm: Communicator) -> list[str]:
    """Answers all questions of a task, in order. The batches do not depend on the number of ranks. Collective."""
    model, tokenizer = writer.model, writer.tokenizer
    answers = tokenizer([entry["answer"] for entry in task.questions], add_special_tokens=False)[
        "input_ids"
    ]
    most = max(map(len, answers)) + ROOM
    chats = (
        _messages(task, entry["question"], bool(tokenizer.chat_template))
        for entry in task.questions
    )
    settings = AnswerSettings(
        task.name, task.digest, tuple(Prompt(*row) for row in enumerate(chats, 1)), most
    )
    embedding: Any = model.get_input_embeddings()
    limits = (
        tokenizer.name_or_path,
        getattr(model.config, "max_position_embeddings", None),
        len(embedding.weight),
    )
    prompts = encode_prompts(settings, tokenizer, limits, "--tasks", enable_thinking=False)
    mine: dict[int, str] = {}
    for first in range(comm.rank * batch_size, len(prompts), comm.world_size * batch_size):
        batch = prompts[first : first + batch_size]
        for i, ids in enumerate(writer.write(batch, max_new_tokens=most, do_sample=False), first):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            mine[i] = (text if tokenizer.chat_template else text.partition("\n\n")[0]).strip()
    everyone = {i: answer for each in comm.gather_objects(mine) for i, answer in each.items()}
    return [everyone[i] for i in range(len(prompts))]


def _messages(task: GymTask, question: str, templated: bool) -> list[Message]:
    """Returns the examples and a question: as turns for a chat template, or else as plain paragraphs."""
    if not templated:
        shown = [f"{entry['question']}\n{entry['answer']}\n\n" for entry in task.examples]
        return [{"role": "user", "content": "".join([*shown, f"{question}\n"])}]
    parts = (("user", "question"), ("assistant", "answer"))
    turns = [
        {"role": role, "content": entry[key]} for entry in task.examples for role, key in parts
    ]
    return [*turns, {"role": "user", "content": question}]
