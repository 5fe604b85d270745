"""Conversations: their forms, whose tokens are learnt, and TRL's masks of the same templates, token by token."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase
from trl import chat_template_utils as trl_templates
from trl.data_utils import common_prefix_length

from loraprune_ds.config import DataConfig
from loraprune_ds.generate.encoding import encode_prompts
from loraprune_ds.generate.prompts import read_prompts
from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.pretrained.sources import embedded_model_dir
from loraprune_ds.pretrained.tokenizer import Starts, load_tokenizer
from loraprune_ds.train.data.loading import load_samples
from loraprune_ds.train.data.samples import LoadedData
from loraprune_ds.train.data.tokens import Chat, ChatTemplate, read_chat
from tests.support.refusals import must_name
from tests.support.texts import numbers, write_json

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = trl_templates.llama3_chat_template
GEMMA = trl_templates.gemma_chat_template
COUNTING = "{{ messages|length }}" + CHATML
ENDLESS = "'' }}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ ''"
SPECIAL = [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


TALKS = [
    [
        user("What is 2 + 3?"),
        assistant("5"),
        user("  and Ünïcode 😀?"),
        assistant("Yes.\n\nIt\tworks \n"),
    ],
    [user("one"), assistant("two")],
    [
        user("assistant"),
        assistant("<|im_start|> user\nmodel"),
        user("three"),
        assistant(""),
        user("four"),
    ],
]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, with the special tokens and the template of another model."""
    tokenizer = load_tokenizer(embedded_model_dir())
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})  # pyright: ignore[reportArgumentType]
    tokenizer.chat_template = template
    return tokenizer


def labels_of(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    template = ChatTemplate(tokenizer)
    ((ids, labels),) = template.tokenize([template.mark(chat)])
    return ids, labels


def learnt(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    _, labels = labels_of(chat, tokenizer)
    return str(tokenizer.decode([label for label in labels if label != IGNORE_INDEX]))


def trl_labels(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Masks as SFTTrainer does with `assistant_only_loss`: by TRL's own training version of the template."""
    template = trl_templates.get_training_chat_template(tokenizer)
    asked: Any = {"return_dict": True, "return_assistant_tokens_mask": True}
    encoded: Any = tokenizer.apply_chat_template(messages, chat_template=template, **asked)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if bit else IGNORE_INDEX for token, bit in zip(ids, mask, strict=True)]


TEMPLATES = {
    "ChatML": trl_templates.qwen3_instruct_2507_chat_template,
    "Llama-3": LLAMA3,
    "Gemma": GEMMA,
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", TALKS, ids=["two turns", "one turn", "odd texts"])
def test_masks_are_those_of_trl_token_by_token(
    messages: list[dict[str, str]], template: str
) -> None:
    tokenizer = tokenizer_with(template)
    # by prefixes: these templates have no {% generation %}
    ids, labels = labels_of(Chat(messages), tokenizer)
    assert "generation %}" not in template
    assert (ids, labels) == trl_labels(messages, tokenizer)
    assert IGNORE_INDEX < max(labels)
    tokenizer.chat_template = trl_templates.get_training_chat_template(tokenizer)
    assert labels_of(Chat(messages), tokenizer) == (ids, labels)  # by {% generation %}


# Not Llama-3: SmolLM2's tokenizer splits the two line ends of its header only if a word follows.
@pytest.mark.parametrize("template", [CHATML, GEMMA], ids=["ChatML", "Gemma"])
def test_a_completion_is_learnt_where_trl_learns_it(template: str) -> None:
    prompt, completion = TALKS[0][:3], TALKS[0][3:]
    tokenizer = tokenizer_with(template)
    ids, labels = labels_of(read_chat({"prompt": prompt, "completion": completion}), tokenizer)
    of_prompt: Any = tokenizer.apply_chat_template(
        prompt, return_dict=False, add_generation_prompt=True
    )
    whole: Any = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
    length = common_prefix_length(of_prompt, whole)  # as SFTTrainer's completion_mask
    assert ids == whole
    assert labels == [IGNORE_INDEX] * length + whole[length:]


def test_qwen3_learns_the_last_answer_of_a_conversation() -> None:
    """Its template takes the thinking out of earlier turns, so a prefix of a conversation is not a prefix."""
    tokenizer = tokenizer_with(trl_templates.qwen3_chat_template)
    assert learnt(Chat(TALKS[1]), tokenizer) == "<think>\n\n</think>\n\ntwo<|im_end|>\n"
    assert (
        learnt(Chat(TALKS[0]), tokenizer)
        == "<think>\n\n</think>\n\nYes.\n\nIt\tworks \n<|im_end|>\n"
    )
    # messages: after the last answer comes a question
    must_name("4 5", labels_of, Chat(TALKS[2]), tokenizer)


@pytest.mark.parametrize("messages", TALKS)
# as in GLM-4.7-Flash, and in Gemma 4 31B
@pytest.mark.parametrize("thought", ["<think>", "<think></think>"])
def test_a_thought_in_the_prompt_alone_changes_nothing(
    thought: str, messages: list[dict[str, str]]
) -> None:
    before, prompt, after = CHATML.rpartition("assistant\\n")
    tokenizer = tokenizer_with(before + prompt + thought + after)
    assert thought in tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert labels_of(Chat(messages), tokenizer) == labels_of(Chat(messages), tokenizer_with(CHATML))


def test_the_template_alone_brings_special_tokens() -> None:
    tokenizer, adding = tokenizer_with(CHATML), tokenizer_with(CHATML)
    with_bos = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    cast(Any, adding).backend_tokenizer.post_processor = with_bos
    assert adding("a")["input_ids"] == [0, *tokenizer("a")["input_ids"]]
    assert labels_of(Chat(TALKS[1]), adding) == labels_of(Chat(TALKS[1]), tokenizer)


def test_only_the_assistants_turns_are_learnt_with_what_ends_them() -> None:
    tokenizer = tokenizer_with(CHATML)
    assert (
        learnt(Chat([{"role": "system", "content": "s"}, *TALKS[1]]), tokenizer)
        == "two<|im_end|>\n"
    )
    # nothing prompts the first
    assert learnt(Chat([assistant("hello"), *TALKS[1]]), tokenizer) == "two<|im_end|>\n"
    assert learnt(Chat([user("a"), user("b")]), tokenizer) == ""
    assert labels_of(Chat([]), tokenizer) == ([], [])
    by_generation = tokenizer_with(trl_templates.llama3_training_chat_template)
    chat = read_chat({"prompt": TALKS[0][:3], "completion": TALKS[0][3:]})
    assert learnt(chat, by_generation) == "Yes.\n\nIt\tworks<|eot_id|>"


# The forms of rows


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALKS[1]},
        {
            "messages": [message | {"tool_calls": None} for message in TALKS[1]],
            "prompt": "not this",
        },
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
        {"conversations": TALKS[1], "messages": None},
        {"prompt": "one", "completion": "two"},
        {"prompt": TALKS[1][:1], "completion": TALKS[1][1:]},
    ],
)
def test_rows_have_the_forms_of_trl_and_of_sharegpt(row: dict[str, Any]) -> None:
    assert read_chat(row).messages == TALKS[1]


def test_tools_come_as_a_list_or_as_json() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for given in (tools, json.dumps(tools)):
        assert read_chat({"messages": TALKS[1], "tools": given}).tools == tools
    tokenizer = tokenizer_with(TEMPLATES["ChatML"])
    ids, labels = labels_of(read_chat({"messages": TALKS[1], "tools": tools}), tokenizer)
    assert '"name": "f"' in str(tokenizer.decode(ids))
    assert tokenizer.decode([label for label in labels if label >= 0]) == "two<|im_end|>\n"


def load(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> LoadedData:
    config = DataConfig(**({"path": str(path), "format": "chat", "window": 64} | settings))
    return load_samples(config, tokenizer, minimum=1, vocab_size=len(tokenizer), starts=Starts())


def test_a_file_of_conversations_gives_samples_and_held_out_conversations(tmp_path: Path) -> None:
    rows = [{"messages": [user(f"question {i}"), assistant(f"answer {i}")]} for i in range(19)] + [
        {"messages": []}
    ]
    tokenizer = tokenizer_with(CHATML)
    path = write_json(tmp_path / "chats.jsonl", rows)
    data = load(path, tokenizer)
    assert (len(data.samples), data.samples.left_out) == (17, 1)
    assert data.held_out.count("<|im_start|>assistant\nanswer") == 2
    assert "answer 4<" in data.held_out
    texts = tokenizer.batch_decode(data.samples.inputs(numbers(*range(17)))["input_ids"])
    assert not any("answer 4<" in text for text in texts)
    packed = load(path, tokenizer, packing=True).samples
    assert len(packed) < 17 == int((packed.columns["position_ids"] == 0).sum())


# What can be wrong


@pytest.mark.parametrize(
    ("rows", "template", "names"),
    [
        ([{"messages": TALKS[0]}], COUNTING, "3 4"),
        ([{"messages": [{"role": "system", "content": "s"}, user("a")]}], GEMMA, "system"),
        ([{"messages": [{"role": "user", "content": 5}]}], CHATML, "user"),
        ([{"text": "a"}], CHATML, "data.format chats.jsonl messages text"),
        ([{"messages": 5}], CHATML, "row 1 chats.jsonl"),
        (
            [{"messages": TALKS[0]}, {"messages": [{"role": "asistant", "content": "b"}]}],
            CHATML,
            "row 2 'asistant'",
        ),
        (
            [{"messages": [{"role": "critic", "content": "c"}]}],
            "{#- no critic -#}" + CHATML,
            "'critic'",
        ),
        ([{"messages": ["a"]}], CHATML, "role content 'a'"),
        ([{"messages": TALKS[0], "tools": "f"}], CHATML, "tools 'f'"),
    ],
)
def test_what_cannot_be_used_is_named(
    rows: list[Any], template: str, names: str, tmp_path: Path
) -> None:
    must_name(
        names, load, write_json(tmp_path / "chats.jsonl", rows * 20), tokenizer_with(template)
    )


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("1 // 0", "ZeroDivisionError"),
        ("'{x}'.format()", "KeyError"),
        ("'{}'.format()", "IndexError"),
        ("range(10 ** 9)", "OverflowError"),
        ("'a' * 10 ** 15", "MemoryError"),
        (ENDLESS, "TimeoutError"),
    ],
)
def test_a_template_that_fails_or_never_ends_is_named_with_the_row(
    expression: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraprune_ds.pretrained.tokenizer.RENDERING", 0.3)
    tokenizer = tokenizer_with(
        f"{{%- if messages[0].content == 'bad' %}}{{{{ {expression} }}}}{{%- endif %}}{CHATML}"
    )
    rows = (
        [{"messages": TALKS[1]}] * 3
        + [{"messages": [user("bad"), assistant("b")]}]
        + [{"messages": TALKS[1]}] * 9
    )
    must_name(
        f"data.path row 4 chats.jsonl {error}",
        load,
        write_json(tmp_path / "chats.jsonl", rows),
        tokenizer,
    )
    prompts = read_prompts(
        str(write_json(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "bad"}]))
    )
    limits = "MODEL", None, 10**6
    must_name(
        f"prompts.jsonl row 2 MODEL {error}",
        encode_prompts,
        prompts,
        tokenizer,
        limits,
        "--answers",
    )


def test_a_template_may_lack_and_may_name_more_roles(tmp_path: Path) -> None:
    # before anything is read
    must_name("template", load, tmp_path / "missing.jsonl", tokenizer_with(None))
    row = {"messages": [{"role": "critic", "content": "c"}, *TALKS[1]]}
    named = tokenizer_with("{%- if messages[0].role == 'critic' %}{%- endif %}" + CHATML)
    assert len(load(write_json(tmp_path / "chats.jsonl", [row] * 20), named).samples) == 18
