"""One rank of `runs.two_ranks`. Prints the loss after a cut."""

import torch

from loraprune_ds.pruning.prunable_model import LayerKeep
from loraprune_ds.zero.device import accelerator, is_cpu
from loraprune_ds.zero.engine import quiet_deepspeed, start_ranks, stop_ranks
from tests.benchmarks.gpu_day.engine import make_request, make_trainer
from tests.benchmarks.gpu_day.sizes import Sizes

SIZE = Sizes(256, 4, 8, 1024, 97, 64, (2,), (), (), (), 64, 1)


def main() -> None:
    if not is_cpu():
        accelerator().communication_backend_name = lambda: "gloo"  # NCCL takes no two ranks on one card
    quiet_deepspeed()
    comm = start_ranks()
    trainer = make_trainer(SIZE, make_request(SIZE, 2, deepspeed="ds_configs/zero3_overlap.json", ranks=2))
    trainer.step(1)
    keep = [LayerKeep(heads=torch.arange(6), channels=torch.arange(960)) for _ in range(SIZE.layers)]
    trainer.model.cut(keep)
    trainer.pruner.average.scores = None
    loss = trainer.step(2).loss
    if comm.rank == 0:
        print(loss, flush=True)
    stop_ranks()


if __name__ == "__main__":
    main()
