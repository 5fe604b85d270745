"""A start does nothing to the folder it is given before it knows that it is the right one."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.state import Origin, RunData, State, Totals
from loraprune_ds.config import EvaluateConfig, LoggingConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.errors import RankError, RunError, UserError
from loraprune_ds.files import json_text, read_json
from loraprune_ds.train.output import OutputFolder, RunStatus
from tests.support.refusals import must_name, refused


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(output_dir=str(tmp_path / "out"))


def start_with(config: RunConfig, resume: str | None = None) -> OutputFolder:
    return OutputFolder(config.to_dict(), resume)


def refused_start(config: RunConfig | dict[str, Any], resume: str | None = "auto") -> str:
    given = config if isinstance(config, dict) else config.to_dict()
    return refused(lambda: OutputFolder(given, resume).start)


def create(config: RunConfig) -> Path:
    output = start_with(config, "auto")
    output.create(config)
    return output.path


def leave(config: RunConfig, state: layout.State = "stopped") -> None:
    """Leaves a run as one in that state does."""
    create(config)
    layout.write_status(Path(config.output_dir), layout.Status(state, 3, 10))


def hit_by_a_power_cut(config: RunConfig) -> None:
    leave(config, "running")
    for name in ("status.json", "config.yaml"):
        (Path(config.output_dir) / name).write_text("")


def hold(config: RunConfig, name: str = "", text: str = "") -> None:
    """Leaves a folder, perhaps with a file of somebody else."""
    Path(config.output_dir).mkdir()
    if name:
        (Path(config.output_dir) / name).write_text(text)


def of_another_seed(config: RunConfig, state: layout.State = "stopped") -> None:
    leave(dataclasses.replace(config, seed=5), state)


def of_an_earlier_commit(
    config: RunConfig, state: layout.State = "stopped", setting: str = "score_every: 1"
) -> None:
    """Leaves a run with a setting that has gone since."""
    leave(config, state)
    path = Path(config.output_dir) / "config.yaml"
    path.write_text(path.read_text().replace("prune:\n", f"prune:\n  {setting}\n"))


Make = Callable[[RunConfig], object]
FOREIGN = partial(hold, name="thesis.tex")
# keys that are no strings
OF_ANOTHER_TOOL = partial(hold, name="config.yaml", text="on: push\njobs: {1: a}\n")
CASES: list[tuple[Make, str | None, str]] = [
    (lambda config: None, None, "fresh"),
    (hold, None, "fresh"),
    (create, None, "output_dir"),
    (FOREIGN, None, "output_dir"),
    (OF_ANOTHER_TOOL, None, "output_dir"),
    (partial(leave, state="running"), None, "running 3 10"),
    (partial(leave, state="failed"), None, "failed 3 10"),
    (partial(leave, state="finished"), None, "finished"),
    (lambda config: None, "auto", "resume"),
    (hold, "auto", "resume"),
    (create, "auto", "resume"),
    (FOREIGN, "auto", "output_dir"),
    (leave, "auto", "resume"),
    (partial(leave, state="finished"), "auto", "finished"),
    (hit_by_a_power_cut, None, "status.json"),
    (hit_by_a_power_cut, "auto", "resume"),
    (of_another_seed, "auto", "seed"),
    (partial(of_another_seed, state="finished"), None, "seed"),
    (of_an_earlier_commit, "auto", "prune.score_every"),
    (of_an_earlier_commit, "auto", "another version"),
    (partial(of_an_earlier_commit, state="finished"), None, "another version"),
    (
        partial(of_an_earlier_commit, setting="sizes: [0.2]"),
        "auto",
        "config.yaml prune.sizes second run",
    ),
]


@pytest.mark.parametrize(("make", "resume", "expected"), CASES)
def test_start(
    config: RunConfig, make: Make, resume: str | None, expected: str, tmp_path: Path
) -> None:
    make(config)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    if expected in ("fresh", "resume", "finished"):
        assert start_with(config, resume).start == expected
    else:
        must_name(expected, lambda: start_with(config, resume).start)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_another_split_of_the_batch_and_another_way_of_saving_are_the_same_run(
    config: RunConfig,
) -> None:
    leave(config)
    train, every = (
        TrainConfig(steps=100, micro_batch_size=8),
        dataclasses.replace(config.checkpoint, every=7),
    )
    other = dataclasses.replace(
        config, train=train, checkpoint=every, logging=LoggingConfig(report_to=[])
    )
    assert start_with(other, "auto").start == "resume"
    faster = dataclasses.replace(config, train=TrainConfig(steps=100, learning_rate=1.0))
    assert "train.learning_rate" in refused_start(faster)


def test_a_finished_run_may_be_measured_in_another_way(config: RunConfig) -> None:
    leave(config, "finished")
    evaluate = EvaluateConfig(after=["piqa"])
    output = start_with(dataclasses.replace(config, evaluate=evaluate))
    assert (output.start, output.config.evaluate) == ("finished", evaluate)


def test_what_is_not_given_comes_from_the_run_that_goes_on(
    config: RunConfig, tmp_path: Path
) -> None:
    saved = dataclasses.replace(
        config, prune=PruneConfig(ratio=0.3, channel_multiple=1), train=TrainConfig(steps=7)
    )
    folder, given = create(saved), {"output_dir": config.output_dir}
    assert OutputFolder(given, "auto").config == OutputFolder(given).config == saved
    more = given | {"prune": {"ratio": 0.4}, "train": None}
    found = OutputFolder(more, "auto").config
    assert (found.prune.ratio, found.prune.channel_multiple, found.train) == (0.4, 1, saved.train)
    assert "prune.ratio" in refused_start(more)
    # Steps and epochs contradict each other.
    assert "train.steps, train.epochs" in refused_start(given | {"train": {"epochs": 2}})

    step = folder / "checkpoints" / "step-3"
    elsewhere = {"output_dir": str(tmp_path / "new")}
    for path in (step, step.parent, folder):
        assert OutputFolder(elsewhere, str(path)).config == dataclasses.replace(saved, **elsewhere)
    assert OutputFolder(elsewhere).config.prune == PruneConfig()


def test_a_choice_that_is_left_to_the_model_stays_as_the_run_made_it(config: RunConfig) -> None:
    made = dataclasses.replace(config, prune=PruneConfig(ranking="uniform", compensate="none"))
    create(made)
    given = {"output_dir": config.output_dir, "prune": {"ranking": None, "compensate": None}}
    assert OutputFolder(given, "auto").config == made
    assert OutputFolder(given, "auto").start == "resume"


def save_state(folder: Path, **changes: Any) -> None:
    step = folder / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    data = RunData("a", "b", {"data": "c0ffee"})
    origin = Origin(changes.pop("config", {}), 3, 0, True, [], "a", "c", data)
    state = State(3, origin, [], "zero3", 1, 2.0, {}, {}, [], 0.5, Totals(), [], "cpu", [])
    (step / "state.json").write_text(json_text(dataclasses.replace(state, **changes)))


def test_a_config_that_a_crash_has_lost_is_in_the_checkpoint(config: RunConfig) -> None:
    saved = dataclasses.replace(config, prune=PruneConfig(ratio=0.3))
    hit_by_a_power_cut(saved)
    save_state(Path(config.output_dir), config=saved.to_dict())
    going_on, fresh = (
        OutputFolder({"output_dir": config.output_dir}, resume) for resume in ("auto", None)
    )
    assert (going_on.config, fresh.continued) == (saved, None)
    assert going_on.continued is not None
    assert going_on.continued.origin.data == RunData("a", "b", {"data": "c0ffee"})


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("name", ["status.json", "config.yaml"])
def test_a_run_of_another_format_is_refused_as_such(
    config: RunConfig, name: str, resume: str | None
) -> None:
    """Also if its config has keys that are gone, or is lost."""
    leave(config)
    folder = Path(config.output_dir)
    save_state(folder, format=layout.FORMAT - 1)
    status = read_json(folder / "status.json") | {"format": layout.FORMAT - 1}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "config.yaml").write_text(
        "" if name == "config.yaml" else yaml.safe_dump({"seed": 1, "gone": 2})
    )

    with pytest.raises(layout.CheckpointMismatch, match=r"format 9, .* commit 91eae51f can finish"):
        _ = OutputFolder({"output_dir": config.output_dir}, resume).start


def test_a_path_in_the_run_or_elsewhere(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start looks next to the checkpoint itself, not next to a link to it."""
    other = tmp_path / "other" / "step-3"
    other.mkdir(parents=True)
    (tmp_path / "latest").symlink_to(other)
    assert start_with(config, str(tmp_path / "latest")).resume_path == other
    monkeypatch.chdir(other.parent)
    named = start_with(config, "step-3")
    assert (named.start, named.resume_path) == ("resume", other)
    leave(config)
    inside = Path(config.output_dir) / "checkpoints"
    inside.mkdir()
    assert start_with(config, str(inside)).start == "resume"
    for path in (other, tmp_path / "nowhere"):
        assert str(path) in refused_start(config, str(path))


def test_one_fresh_start_gets_the_folder_and_the_next_removes_what_a_killed_process_left(
    config: RunConfig,
) -> None:
    first, second = start_with(config), start_with(config)
    assert (first.start, second.start) == ("fresh", "fresh")
    first.create(config)
    folder = first.path
    must_name(str(second.path), lambda: second.create(config))
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.to_dict()
    (folder / ".status.json.1234.tmp").write_text("{")
    (folder / "checkpoints" / ".step-4.1234.partial").mkdir(parents=True)
    create(config)
    assert sorted(path.name for path in folder.rglob("*")) == ["checkpoints", "config.yaml"]


def run_status(
    folder: Path, *, first: int = 4, mark: str = "a", rank: int = 0, ranks: int = 1
) -> RunStatus:
    return RunStatus(folder, 10, first=first, mark=mark, rank=rank, ranks=ranks)


def fail_inside(
    status: RunStatus, error: BaseException, during: Callable[[], None] = lambda: None
) -> None:
    def run() -> None:
        with status:
            during()
            raise error

    with pytest.raises(type(error)):
        run()


def last_status(folder: Path) -> layout.Status:
    found = layout.read_status(folder)
    assert found is not None
    return found


def test_status_follows_the_run_and_keeps_its_error(tmp_path: Path) -> None:
    status = run_status(tmp_path)
    seen: list[layout.Status] = []

    def train() -> None:
        seen.append(last_status(tmp_path))
        status.update(5)

    fail_inside(status, UserError("no\nluck"), train)
    last = last_status(tmp_path)
    assert (seen[0].state, seen[0].step) == ("running", 4)
    assert (last.state, last.step, last.steps, last.error) == ("failed", 5, 10, "no luck")


def test_of_two_jobs_on_one_run_the_first_ends_and_leaves_the_status_alone(tmp_path: Path) -> None:
    first, second = run_status(tmp_path, mark="a"), run_status(tmp_path, mark="b")

    def be_superseded() -> None:
        first.update(5)
        second.__enter__()
        with pytest.raises(RunError, match="output_dir"):
            first.check_owner()
        with pytest.raises(RankError, match="output_dir"):
            first.update(6)

    fail_inside(first, RankError("another process"), be_superseded)
    found = last_status(tmp_path)
    assert (found.state, found.step, found.mark) == ("running", 4, "b")
    second.check_owner()
    second.update(5)


def test_ranks_that_write_no_status_do_not_read_it_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "loraprune_ds.checkpoint.layout.read_status",
        lambda folder: pytest.fail("read at every step"),
    )
    with run_status(tmp_path, rank=1, ranks=2) as status:
        status.update(5)
        status.end("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("out of\nmemory"), "rank 1: RuntimeError: out of memory"),
        (RankError("step 3: too large"), "step 3: too large"),
        (UserError("agreed"), "rank 0: RuntimeError: Connection closed by peer"),
    ],
)
def test_what_a_rank_met_alone_is_not_hidden_by_a_lost_connection(
    tmp_path: Path, error: Exception, line: str
) -> None:
    """Rank 0 may still be at the end of the step before."""
    first, other = run_status(tmp_path, ranks=2), run_status(tmp_path, rank=1, ranks=2)

    def end_the_step() -> None:
        fail_inside(other, error)
        first.update(5)

    fail_inside(first, RuntimeError("Connection closed by peer"), end_the_step)
    assert last_status(tmp_path).error == line


@pytest.mark.parametrize("state", ["running", "finished"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_went_on_elsewhere_is_not_called_failed(
    tmp_path: Path, state: layout.State, rank: int
) -> None:
    """By what was left of it on a node that was lost, and fails when it is found again."""
    elsewhere = layout.Status(state, 9, 10)
    status = run_status(tmp_path, rank=rank, ranks=2)
    fail_inside(
        status,
        RuntimeError("Connection closed by peer"),
        lambda: layout.write_status(tmp_path, elsewhere),
    )
    assert last_status(tmp_path) == elsewhere


def test_a_status_that_cannot_be_written_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, status = Mock(side_effect=OSError(28, "No space left on device")), run_status(tmp_path)
    fail_inside(status, UserError("x"), lambda: monkeypatch.setattr(layout, "write_status", full))
