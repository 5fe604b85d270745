"""Makes a Llama whose linears lie on the grid of NF4, to see what 4 bits cost before anybody builds them.

NF4 has 16 levels (QLoRA, arXiv 2305.14314, appendix E). A block of 64 neighbours along the hidden axis has one scale,
its largest value, in bf16. A cut does not touch these blocks. So a model of 4 bits would train just as this one does in
bf16, as long as nothing but a cut changes its weights.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.files import read_json
from loraprune_ds.model.family import LLAMA_LINEARS
from tests.benchmarks.expand_heads import write_changed

BLOCK = 64
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def rounded_model(source: Path, folder: Path) -> Path:
    """Writes the model into `folder`, unless it is there."""
    if folder.exists():
        return folder
    axes = {linear.name: linear.axis for linear in LLAMA_LINEARS}
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        for linear, axis in axes.items():
            if name.endswith(f".{linear}.weight"):
                tensors[name] = round_nf4(tensor, hidden=1 - axis)
    return write_changed(source, folder, tensors, read_json(source / "config.json"))


def round_nf4(weight: Tensor, hidden: int) -> Tensor:
    """Rounds to the nearest level of NF4. The axis `hidden` has the blocks."""
    blocks = weight.float().movedim(hidden, -1).unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).bfloat16().float()
    middles = (LEVELS[1:] + LEVELS[:-1]) / 2
    levels = LEVELS[torch.bucketize(blocks / scale.clamp(min=torch.finfo(torch.float32).tiny), middles)]
    return (levels * scale).flatten(-2).movedim(-1, hidden).to(weight.dtype).contiguous()
