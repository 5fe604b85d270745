"""The callback in TRL's GRPOTrainer. Takes minutes."""

from pathlib import Path
from typing import Any, cast

import torch

from loraprune_ds import LoraPruneCallback, PruneConfig, linear_names
from loraprune_ds.files import read_json
from tests.integration.heavy.results import TAKES_MINUTES
from tests.oracle.models import make_tiny_llama
from tests.support.callback_results import check_results
from tests.support.ranks import RankPool
from tests.support.trainers import fresh_accelerate

pytestmark = TAKES_MINUTES


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 17) for text in completions]


def train_grpo(model: str, out: Path, ids: torch.Tensor) -> torch.Tensor:
    """Tunes by rewards, with generation between the cuts. Returns the live model's logits."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    with fresh_accelerate():
        sizes: Any = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        }
        sizes |= {"num_generations": 2, "max_completion_length": 8, "beta": 0.04}
        where: Any = {"output_dir": str(out), "use_cpu": True, "bf16": False, "disable_tqdm": True}
        deepspeed = read_json(Path("ds_configs/zero3.json"))
        args = GRPOConfig(
            **where, **sizes, deepspeed=deepspeed, report_to="none", save_strategy="no"
        )
        callback = LoraPruneCallback(PruneConfig(ratio=0.3, prune_every=1, criterion="fisher"))
        trainer = GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=cast(Any, reward),
            train_dataset=Dataset.from_dict(
                {"prompt": ["the cat sat", "a dog ran home", "it rained", "a mat"] * 16}
            ),
            peft_config=LoraConfig(r=8, target_modules=linear_names(model), task_type="CAUSAL_LM"),
            callbacks=[callback],
        )
        trainer.train()
        trainer.save_model()
        callback.save_base(out / "base", out)
        callback.save_model(out / "model")
        engine = cast(Any, trainer.model_wrapped)
        engine.eval()
        with torch.no_grad():
            return engine(input_ids=ids).logits.float().clone()


def test_grpo(ranks: RankPool, tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", heads=8, kv_heads=4, hidden=64, ffn=640, layers=4)
    out, ids = tmp_path / "out", torch.arange(3, 35)[None]
    live = ranks.run(2, train_grpo, str(folder), out, ids)[0]
    check_results(folder, out, ids, live, has_adapter=True)
