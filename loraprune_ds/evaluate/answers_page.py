"""The answers of an evaluation as one HTML page: no server, no script, all texts escaped."""

from collections.abc import Iterator
from html import escape
from typing import Any

from loraprune_ds.units import format_percent

KINDS = ("greedy", "sampled")
# Columns become rows where two do not fit, as on a phone.
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 0 auto; padding: 0 0.8rem 3rem; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 0.6rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.2rem 0; font: 0.9rem/1.4 ui-monospace, monospace; }
.prompt { border-left: 3px solid #0072b2; padding-left: 0.7rem; }
.answer { border: 1px solid #8886; border-radius: 0.3rem; padding: 0.4rem 0.6rem; min-width: 0; }
small { color: #767676; }
h1, p { overflow-wrap: anywhere; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def answers_page(result: dict[str, Any]) -> str:
    """Builds the page from the object of `--json`. The dense model is on the left."""
    plan = result["answers_plan"]
    models = [(name, model) for name, model in (("dense", result["dense"]), ("model", result)) if model]
    lines = [f"{name}: {model['path']}. {_describe(model['answers'])}" for name, model in models]
    parts = [f"<p>{escape(line)}</p>" for line in (*lines, describe_plan(plan))]
    for i, prompt in enumerate(plan["prompts"]):
        parts += _section(i, prompt, models)
    return PAGE.format(title=escape(f"Answers of {result['path']}"), style=STYLE, body="\n".join(parts))


def describe_plan(plan: dict[str, Any]) -> str:
    """Describes how the answers were written, in one line."""
    return (
        f"{plan['name']}: {len(plan['prompts'])} prompts, at most {plan['max_new_tokens']} tokens each; sampled at "
        f"temperature {plan['temperature']}, top_k {plan['top_k']}, seed {plan['seed']}"
    )


def _describe(answers: dict[str, Any]) -> str:
    parts = [
        f"{kind}: {answers[kind]['tokens']:.1f} tokens, {format_percent(answers[kind]['ended'])} end by themselves, "
        f"{format_percent(answers[kind]['repetition'])} of 4-grams repeated"
        for kind in KINDS
    ]
    return "; ".join(parts) + ("" if answers["chat_template"] else "; no chat template, so plain text")


def _section(i: int, prompt: dict[str, Any], models: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    yield f"<section><h2>{escape(str(i + 1))} {escape(prompt['kind'] or '')}</h2>"
    for message in prompt["messages"]:
        role = "" if len(prompt["messages"]) == 1 else f"<small>{escape(message['role'])}</small>"
        yield f'<div class="prompt">{role}<pre dir="auto">{escape(message["content"])}</pre></div>'
    if prompt["expected"]:
        yield f"<p><small>expected:</small> {escape(prompt['expected'])}</p>"
    for kind in KINDS:
        yield '<div class="side">'
        for name, model in models:
            answer = model["answers"][kind]["texts"][i]
            end = "ended" if answer["ended"] else "cut off" if answer["tokens"] else "empty"
            facts = f"{answer['tokens']} tokens, {end}, {format_percent(answer['repetition'])} repeated"
            text = escape(answer["text"]) or "<small>(nothing)</small>"
            yield f'<div class="answer"><small>{name}, {kind}: {facts}</small><pre dir="auto">{text}</pre></div>'
        yield "</div>"
    yield "</section>"
