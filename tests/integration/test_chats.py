"""`launch/chats.py` as a user starts it: ranks share the draws, and the chats are tuned on."""

from argparse import Namespace
from pathlib import Path

from loraprune_ds.chats.collect import collect
from loraprune_ds.chats.draws import Draw
from loraprune_ds.config import DataSource
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.train.data.sources import read_rows
from loraprune_ds.train.data.tokens import read_chat
from tests.support.chat_model import make_chat_model
from tests.support.launching import ROOT, fork_ranks
from tests.support.ranks import RankPool

CHATS = ROOT / "launch" / "chats.py"


def test_two_ranks_write_the_chats_of_one(tmp_path: Path) -> None:
    model, prompts, outputs = (
        make_chat_model(tmp_path / "model"),
        tmp_path / "prompts.jsonl",
        list[str](),
    )
    prompts.write_text(
        "".join(f'{{"prompt": "How much is {i} + {i}?", "kind": "sum"}}\n' for i in range(15))
    )
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        given = f"{model} --out {folder / 'chats.jsonl'} --max-new-tokens 40 --prompts {prompts} --local_rank=0"
        first, *others = fork_ranks(given.split(), folder, script=CHATS, ranks=ranks, timeout=180)
        outputs.append(first.check().out.replace(str(folder), ""))
        assert not any(other.check().out for other in others)
    files = ("chats.jsonl", "chats.draws.jsonl", "chats.settings.json")
    assert outputs[0] == outputs[1]
    assert (
        len({tuple((tmp_path / ranks / name).read_text() for name in files) for ranks in "12"}) == 1
    )
    rows = read_rows(DataSource(str(tmp_path / "1" / "chats.jsonl"), format="chat"))
    assert len(rows) > 1
    assert [len(read_chat(row).messages) for row in rows] == [2] * len(rows)
    table, kind, *_, last = outputs[0].splitlines()
    assert table.split()[:3] == ["kind", "draws", "kept"]
    assert kind.split()[:3] == ["sum", "15", str(len(rows))]
    assert last.startswith(f"{len(rows)} rows of ")
    assert outputs[0].count("\nassistant: ") == min(10, len(rows))


def kept(options: Namespace) -> list[Draw]:
    return collect(options, Communicator()).kept


def test_ranks_stop_at_the_row_where_one_stops(ranks: RankPool, tmp_path: Path) -> None:
    model = make_chat_model(tmp_path / "model")
    asked = {"tokens": 300, "max_new_tokens": 40, "batch_size": 2, "prompts": None, "text": None}
    options = Namespace(model=str(model), seed=0, engine="transformers", **asked)
    expected = kept(Namespace(**vars(options), out=tmp_path / "one.jsonl"))
    assert (
        ranks.run(2, kept, Namespace(**vars(options), out=tmp_path / "two.jsonl")) == [expected] * 2
    )
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert len(expected) > 1
