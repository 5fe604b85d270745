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
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.generate.encoding import encode_prompts
from loraprune_ds.generate.prompts import AnswerSettings, Message, Prompt
from loraprune_ds.generate.writer import Writer
from loraprune_ds.ranks.comm import Communicator

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
    require(
        importlib.util.find_spec("lm_eval") is not None,
        "--tasks needs the package lm-eval: pip install 'lm-eval[hf]'",
    )
    folder = settings.include_path
    require(folder is None or folder.is_dir(), f"--include-path: {folder} is not a folder")
    available = _task_manager(folder).all_tasks
    for name in _expand(others.names):
        is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
        if name not in available and not is_file:
            hint = did_you_mean(name, available) or "; see `lm-eval ls tasks`"
            raise UserError(f"--tasks: lm-eval knows no task {name}{hint}")


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
    if others.names:
        results, reported = _run_lm_eval(others, writer, batch_size, comm)
    if gym.names:
        gym_results, reported[GYM] = _run_gym(gym, writer, batch_size, comm)
        results |= gym_results
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
    model = base(writer.model, backend, tokenizer=writer.tokenizer, batch_size=batch_size)
    model._rank = comm.rank
    model._world_size = comm.world_size
    # a scalar from each: (world_size,)
    model.all_gather = lambda tensor: comm.all_gather(tensor.view(1)).flatten()
    model.barrier = comm.barrier
    return model


def _expand(names: Sequence[str]) -> list[str]:
    """Replaces names of sets by their tasks. No task is repeated."""
    tasks: list[str] = []
    for name in names:
        tasks += SETS.get(name, (name,))
    return list(dict.fromkeys(tasks))


@cache
def _task_manager(include_path: Path | None) -> Any:
    """Makes lm-eval's index of all task files, which takes seconds."""
    return _lm_eval(".tasks").TaskManager(include_path=include_path)


def _lm_eval(module: str) -> Any:
    """Imports a module of lm-eval, which may not be installed where types are checked."""
    return importlib.import_module(f"lm_eval{module}")


@dataclass(frozen=True)
class GymTask:
    """A task with its questions."""

    name: str  # as in the results
    dataset: Any
    questions: list[Question]
    examples: list[Question]

    @property
    def digest(self) -> str:
        """Returns the SHA-256 of examples and questions. Only results with equal digests are comparable."""
        questions = [entry["question"] for entry in (*self.examples, *self.questions)]
        return hashlib.sha256("\0".join(questions).encode()).hexdigest()

    def score(self, answer: str, question: Question) -> float:
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
    """Makes the questions of the task `name`, such as "products" or "products:easy", and its examples."""
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
        examples: list[Question] = []
        for i in range(len(candidates)):
            entry = candidates[i]
            if entry["question"] not in texts:
                examples.append(entry)
    except Exception as error:  # a task may need more settings, and its generator raises anything
        raise UserError(f"{option}: {one_line(error)}") from error
    require(
        all(isinstance(entry["answer"], str) for entry in (*questions, *examples)),
        f"{option}: its questions have no right answer for the examples",
    )
    require(
        len(examples) >= fewshot,
        f"{option}: it has too few different questions; lower --num-fewshot or --limit",
    )
    return GymTask(f"{GYM}:{name}", dataset, questions, examples[:fewshot])


def _run_gym(
    settings: TaskSettings, writer: Writer, batch_size: int, comm: Communicator
) -> ResultsAndSettings:
    """Runs the tasks. Rank r takes batches r, r + world_size, and so on. Collective."""
    tasks = load_tasks(settings)
    results = {}
    for task in tasks:
        answers = greedy_answers(task, writer, batch_size, comm)
        pairs = zip(answers, task.questions, strict=True)
        scores = [task.score(answer, question) for answer, question in pairs]
        count = len(scores)
        share = sum(score >= 1 for score in scores) / count  # of full scores
        error = math.sqrt(share * (1 - share) / max(1, count - 1))
        results[task.name] = {
            "exact_match,none": share,
            "exact_match_stderr,none": error,
            "score,none": sum(scores) / count,
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
    tokenizer = writer.tokenizer
    has_template = bool(tokenizer.chat_template)
    right_answers = [entry["answer"] for entry in task.questions]
    right_ids = tokenizer(right_answers, add_special_tokens=False)["input_ids"]
    most = max(map(len, right_ids)) + ROOM
    prompts: list[Prompt] = []
    for number, entry in enumerate(task.questions, start=1):
        prompts.append(Prompt(number, _messages(task, entry["question"], has_template)))
    encoded = encode_prompts(
        AnswerSettings(task.name, task.digest, tuple(prompts), most),
        tokenizer,
        _limits(writer),
        "--tasks",
        enable_thinking=False,
    )
    answers: dict[int, str] = {}  # of this rank, by the number of the question
    for first in range(comm.rank * batch_size, len(encoded), comm.world_size * batch_size):
        batch = encoded[first : first + batch_size]
        for i, ids in enumerate(writer.write(batch, max_new_tokens=most, do_sample=False), first):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            if not has_template:
                text, _, _ = text.partition("\n\n")
            answers[i] = text.strip()
    all_answers: dict[int, str] = {}
    for rank_answers in comm.gather_objects(answers):
        all_answers |= rank_answers
    return [all_answers[i] for i in range(len(encoded))]


def _limits(writer: Writer) -> tuple[str, int | None, int]:
    """Returns the name, the context length and the vocabulary of a model."""
    positions = getattr(writer.model.config, "max_position_embeddings", None)
    embedding: Any = writer.model.get_input_embeddings()
    return writer.tokenizer.name_or_path, positions, len(embedding.weight)


def _messages(task: GymTask, question: str, templated: bool) -> list[Message]:
    """Returns the examples and a question: as turns for a chat template, or else as plain paragraphs."""
    if not templated:
        paragraphs = [f"{entry['question']}\n{entry['answer']}\n\n" for entry in task.examples]
        return [{"role": "user", "content": "".join([*paragraphs, f"{question}\n"])}]
    turns: list[Message] = []
    for entry in task.examples:
        turns.append({"role": "user", "content": entry["question"]})
        turns.append({"role": "assistant", "content": entry["answer"]})
    return [*turns, {"role": "user", "content": question}]
