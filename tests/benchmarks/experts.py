"""Prunes the experts of a real network: SmolLM2-135M whose MLPs are split into 8 experts, of which a token takes 4.

    python -m tests.benchmarks.experts [--steps 24] [--tune 60] [--ranks 2]

No mixture of experts is on PyPI, so one is made of the embedded model: channels that are large on the same tokens come
together, a router is fitted by least squares, and both are tuned for some steps. Each run of launch/run.py leaves 6 or
4 experts, chosen by `lora`, `fisher`, at random, or by REAP's score (peer_run.py). `once` cuts at the last of 4 steps
that change nothing. Results go to results/experts.json. A second start makes only the missing runs.
"""

# torch and transformers do not type all that is used here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from loraprune_ds.config import DataConfig
from loraprune_ds.files import read_json
from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.tokenizer import load_tokenizer
from loraprune_ds.train.data.loading import load_samples
from tests.benchmarks.running import RESULTS, make_parser, run_quickstart

RESULT = RESULTS / "experts.json"
EXPERTS, CHOSEN = 8, 4
CALIBRATION, BATCH = 32, 8  # samples
RIDGE = 1e-2
# (experts that stay, criterion, cut once without training)
RUNS = [(kept, *how) for kept in (4, 6) for how in (("reap", True), ("random", True), ("lora", True), ("lora", False))]
RUNS += [(kept, how, False) for kept in (4, 6) for how in ("reap", "random", "fisher")]
PEER = "reap"  # which is no criterion of the package


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tune", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", help="part of the names of the runs to make")
    parser.add_argument("--model", type=Path, help="folder to keep the mixture in, or of one that is there")
    arguments = parser.parse_args()
    rows: dict[str, Any] = read_json(RESULT)["runs"] if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        model: Path = arguments.model or Path(work, "mixture")
        if not (model / "config.json").is_file():
            make_mixture(model, arguments.tune)
        for kept, criterion, once in RUNS:
            name = f"{kept} of {EXPERTS} experts, {criterion}, {'once' if once else f'{arguments.steps} steps'}"
            if name not in rows and (arguments.only is None or arguments.only in name):
                print(f"{name} ...", file=sys.stderr, flush=True)
                changes = settings(model, kept, criterion, arguments.steps, once=once)
                rows[name] = run(model, changes, arguments.ranks, Path(work, "run"), PEER if criterion == PEER else "")
                RESULT.write_text(json.dumps({"tuned_steps": arguments.tune, "runs": rows}, indent=1) + "\n")


def settings(model: Path, kept: int, criterion: str, steps: int, *, once: bool) -> list[str]:
    shape = shape_from_config(read_json(model / "config.json"), "mixture")
    of_experts = (EXPERTS - kept) * len(shape.layers) * shape.group_numel("experts")
    changes = [f"prune.ratio={of_experts / shape.linear_numel()}", f"train.steps={4 if once else steps}"]
    changes += [] if criterion == PEER else [f"prune.criterion={criterion}"]
    changes += ["prune.protected_first=0", "prune.protected_last=0", "checkpoint.every=null", "logging.report_to=[]"]
    if once:
        changes += ["prune.prune_every=4", "prune.cooldown_fraction=0.0", "train.learning_rate=1e-12"]
    return changes


def run(model: Path, changes: list[str], ranks: int, out: Path, peer: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        settings = (f"model.path={model}", f"output_dir={folder}/run", *changes)
        run_quickstart(ranks, settings, peer=peer, stdout=sys.stderr)
        report = read_json(Path(folder, "run", "report.json"))
    report["config"] |= {"output_dir": "run", "model": report["config"]["model"] | {"path": "mixture"}}
    return {key: report[key] for key in ("perplexity", "params", "versions", "hardware", "config")}


def make_mixture(folder: Path, tuned: int) -> None:
    """Writes the embedded model as a mixture of experts, tuned for some steps."""
    torch.manual_seed(0)
    source = embedded_model_dir()
    tokenizer = load_tokenizer(source)
    samples = load_samples(DataConfig(window=128), tokenizer, minimum=BATCH, vocab_size=len(tokenizer)).samples
    ids = samples.inputs(torch.randperm(len(samples))[: max(CALIBRATION, BATCH * tuned)])["input_ids"]
    dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    mixture: Any = MixtralForCausalLM(mixtral_config(dense.config))
    missing = mixture.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert all(".experts." in name or ".gate." in name for name in missing), missing
    split_layers(dense, mixture, ids[:CALIBRATION])
    tune(mixture, ids, tuned)
    mixture.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mixtral_config(dense: Any) -> MixtralConfig:
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    kept += ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "hidden_act")
    kept += ("bos_token_id", "eos_token_id", "pad_token_id")
    of_experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "sliding_window": None}
    size = {"intermediate_size": dense.intermediate_size // EXPERTS}
    return MixtralConfig(**{key: getattr(dense, key) for key in kept}, **of_experts, **size)


@torch.no_grad()
def split_layers(dense: Any, mixture: Any, ids: Tensor) -> None:
    """Makes the experts and the router of every layer from what its MLP computes on some text."""
    inputs: list[Tensor] = []
    for layer in dense.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    dense.model(input_ids=ids, use_cache=False)
    for source, target, x in zip(dense.model.layers, mixture.model.layers, inputs, strict=True):
        gate, up, down = (getattr(source.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        inside = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)  # (tokens, channels)
        groups = group_channels(inside.abs() * down.norm(dim=0))
        norms = []
        for expert, channels in enumerate(groups):
            target.mlp.experts.gate_up_proj[expert] = torch.cat([gate[channels], up[channels]])
            # The router's weights add up to 1, where each of the chosen should count whole.
            target.mlp.experts.down_proj[expert] = CHOSEN * down[:, channels]
            norms.append((inside[:, channels] @ down[:, channels].T).norm(dim=1))
        target.mlp.gate.weight.copy_(fit_router(x, torch.stack(norms, 1)))


def group_channels(sizes: Tensor) -> list[Tensor]:
    """Groups channels that are large on the same tokens: balanced k-means of their normed sizes. (tokens, channels)."""
    points = (sizes / sizes.norm(dim=0)).T
    centres, each = points[torch.randperm(len(points))[:EXPERTS]], len(points) // EXPERTS
    groups: list[Tensor] = []
    for _ in range(10):
        near = points @ centres.T  # (channels, experts)
        wanted = cast(list[list[float]], near.tolist())
        order = (near.max(1).values - near.mean(1)).argsort(descending=True)  # those that care most choose first
        groups, room = [], [each] * EXPERTS
        of_expert: list[list[int]] = [[] for _ in range(EXPERTS)]
        for channel in cast(list[int], order.tolist()):
            free = [e for e in range(EXPERTS) if room[e]]
            best = max(free, key=wanted[channel].__getitem__)
            of_expert[best].append(channel)
            room[best] -= 1
        groups = [torch.tensor(sorted(channels)) for channels in of_expert]
        centres = torch.stack([points[channels].mean(0) for channels in groups])
        centres = centres / centres.norm(dim=1, keepdim=True)
    return groups


def fit_router(x: Tensor, norms: Tensor) -> Tensor:
    """Fits logits to the relative norms of the experts' outputs by ridge regression. Small ones, so that all count."""
    wanted = norms / norms.mean(1, keepdim=True) - 1
    moment = x.T @ x
    moment += RIDGE * moment.diagonal().mean() * torch.eye(len(moment))
    return torch.linalg.solve(moment, x.T @ wanted).T


def tune(mixture: Any, ids: Tensor, steps: int) -> None:
    """Trains router and experts. Prints the loss."""
    for name, parameter in mixture.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    optimizer = torch.optim.AdamW([p for p in mixture.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / steps))
    mixture.train()
    for step in range(steps):
        batch = ids[step * BATCH : (step + 1) * BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            loss = mixture(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixture.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"tuned {step + 1} of {steps}: loss {float(loss):.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
