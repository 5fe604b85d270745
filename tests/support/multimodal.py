"""Tiny random multimodal models, and inputs with an image."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from loraprune_ds.model.family import FAMILIES
from tests.oracle.models import make_tokenizer
from tests.support.families import SIZES, tiny_config

SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SIGLIP |= {"image_size": 28, "patch_size": 14}
QWEN = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "in_channels": 3,
}
QWEN |= {
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "num_position_embeddings": 16,
    "out_hidden_size": 60,
}
IMAGE, START, END = 90, 92, 93  # ids
OF_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
OF_ROWS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}
# The family of the text part, the type of the tower, and whether head and embedding are one.
TOWERS = {
    "gemma3": ("gemma3_text", "siglip_vision_model", True),
    "mistral3": ("mistral", "pixtral", False),
    "llava": ("llama", "clip_vision_model", False),
    "llava_next": ("mistral", "clip_vision_model", False),
    "llava_onevision": ("qwen2", "siglip_vision_model", True),
    "vipllava": ("llama", "clip_vision_model", False),
    "internvl": ("qwen3", "internvl_vision", False),
    "idefics3": ("llama", "idefics3_vision", False),
    "smolvlm": ("llama", "smolvlm_vision", True),
    "qwen2_5_vl": ("qwen2", "", False),
    "qwen3_vl": ("qwen3", "", False),
    "gemma4": ("gemma4_text", "gemma4_vision", True),
    "qwen3_vl_moe": ("qwen3_moe", "", False),
    "qwen3_5": ("qwen3_5_text", "", True),
    "qwen3_5_moe": ("qwen3_5_moe_text", "", False),
    "muse_glimmer": ("muse_glimmer_text", "muse_glimmer_vision", False),
}
ROWS_IN_TURN = OF_ROWS | {"mrope_interleaved": True}
QWEN3_5 = {
    "mtp_num_hidden_layers": 1,
    "rope_parameters": ROWS_IN_TURN | {"partial_rotary_factor": 0.5},
}
QWEN3 = {"head_dim": 12, "rope_parameters": ROWS_IN_TURN | {"mrope_section": [2, 2, 2]}}
TEXT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_text", "rope_parameters": OF_ROWS},
    **{name: {"model_type": f"{name}_text", **QWEN3} for name in ("qwen3_vl", "qwen3_vl_moe")},
    # Its last two layers share keys and values, and have twice the channels.
    "gemma4": {
        "enable_moe_block": False,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
}
GEMMA4_HEADS = {"head_dim": 8, "num_key_value_heads": 2}
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {"image_size": 16, "patch_size": 4},
    "gemma4": {"patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 16}
    | GEMMA4_HEADS,
    "muse_glimmer": {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
    "qwen2_5_vl": {"window_size": 8, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"deepstack_visual_indexes": [0]},
    "qwen3_vl_moe": {"deepstack_visual_indexes": [0]},
}


def multimodal(outer: str, text_type: str | None = None) -> transformers.PreTrainedModel:
    """Makes a tiny random multimodal model, in evaluation mode."""
    family, tower, tied = TOWERS[outer]
    family = text_type or family
    text = FAMILIES[family].explicit(tiny_config(family).to_dict())
    text |= {"tie_word_embeddings": tied} | (
        {} if outer == "muse_glimmer" else {"final_logit_softcapping": None}
    )
    vision = (SIGLIP | {"model_type": tower} if tower else QWEN) | VISION.get(outer, {})
    more: dict[str, Any] = {} if tower else dict(OF_QWEN)
    if outer == "gemma3":
        more = {"mm_tokens_per_image": 4, "image_token_id": IMAGE}
    if outer == "gemma4":
        more = {"audio_config": None, "image_token_id": IMAGE, "video_token_id": 91}
    if outer == "muse_glimmer":
        more = {
            "image_token_id": IMAGE,
            "video_token_id": 91,
            "out_hidden_size": 64,
            "projector_hidden_size": 16,
        }
    config = transformers.AutoConfig.for_model(
        outer,
        text_config=text | TEXT.get(outer, {}),
        vision_config=vision,
        tie_word_embeddings=tied,
        **more,
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
