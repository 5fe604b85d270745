"""Makes a tiny model with a chat template."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.oracle.models import make_tiny_llama

BOS, END = 1, 2
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "


def make_chat_model(folder: Path) -> Path:
    """Makes a random chat model, most of whose texts end by themselves."""
    make_tiny_llama(folder, vocab=259)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][END] *= 2.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
