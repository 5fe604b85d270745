"""Tiny random multimodal models, and inputs with an image."""

from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor

from loraprune_ds.model.family import FAMILIES
from tests.oracle.models import make_tokenizer
from tests.support.families import SIZES, tiny_config

IMAGE, START, END = 90, 92, 93  # ids, as in the file
_FILE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("multimodal.yaml").read_text())
TOWERS: dict[str, tuple[str, str, bool]] = {
    outer: tuple(row) for outer, row in _FILE["towers"].items()
}


def multimodal(outer: str, text_type: str | None = None) -> transformers.PreTrainedModel:
    """Makes a tiny random multimodal model, in evaluation mode."""
    family, tower, tied = TOWERS[outer]
    family = text_type or family
    text = FAMILIES[family].explicit(tiny_config(family).to_dict())
    text |= {"tie_word_embeddings": tied} | (
        {} if outer == "muse_glimmer" else {"final_logit_softcapping": None}
    )
    vision = _FILE["typed"] | {"model_type": tower} if tower else _FILE["qwen"]
    config = transformers.AutoConfig.for_model(
        outer,
        text_config=text | _FILE["text"].get(outer, {}),
        vision_config=vision | _FILE["vision"].get(outer, {}),
        tie_word_embeddings=tied,
        **_FILE["whole"].get(outer, {}),
    )
    torch.manual_seed(3)
    eager: Any = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForImageTextToText.from_config(config, **eager)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def load_whole(
    folder: Path, auto: Any = transformers.AutoModelForImageTextToText, **settings: Any
) -> Any:
    """Loads an export by a stock class. No tensor may be missing, surplus or of another shape."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return model


def save_gemma3(folder: Path) -> None:
    """Writes a whole Gemma 3 with tokenizer and processor, whose image tokens are letters."""
    multimodal("gemma3").save_pretrained(folder)
    tokenizer = make_tokenizer(SIZES["vocab_size"])
    names = zip(("image_token", "boi_token", "eoi_token"), (IMAGE, START, END), strict=True)
    special = {name: tokenizer.convert_ids_to_tokens(token) for name, token in names}
    tokenizer.save_pretrained(folder)
    named = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=special)
    image_processor = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    transformers.Gemma3Processor(image_processor, named, image_seq_length=4).save_pretrained(folder)


def inputs_with_image(outer: str) -> dict[str, Tensor]:
    """Returns one prompt with an image of four tokens, in fp64."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, IMAGE - 1, (1, 19), generator=generator)
    ids[0, 4:8] = IMAGE
    is_image = (ids == IMAGE).int()
    if outer == "gemma3":
        pixels = torch.randn(1, 3, 16, 16, generator=generator).double()
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": is_image}
    if outer == "gemma4":
        at = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)[None]
        pixels = torch.rand(1, 16, 48, generator=generator).double()
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_position_ids": at,
            "mm_token_type_ids": is_image,
        }
    ids[0, 3], ids[0, 8] = START, END
    size = 96 if outer == "muse_glimmer" else 48  # of a patch, there of two frames
    pixels, grid = torch.randn(16, size, generator=generator).double(), torch.tensor([[1, 4, 4]])
    types = {} if outer == "muse_glimmer" else {"mm_token_type_ids": is_image}
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, **types}
