"""The simulated device refuses what a card refuses, and its counts are exact. Each number is counted by hand."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from loraprune_ds.model import codecs
from loraprune_ds.model.frozen import Blocks
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import foreach
from tests.support import device
from tests.support.device import DEVICE, counted
from tests.support.ranks import RankPool

pytestmark = pytest.mark.skipif(device.MISSING is not None, reason=str(device.MISSING))


def test_tensors_of_the_host_do_not_mix(device_ranks: RankPool) -> None:
    (message,) = device_ranks.run(1, mixed)
    assert "aten.add.Tensor: tensors on sim:0 and on cpu" in message


def mixed() -> str:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(3, device=DEVICE).add(torch.ones(3))
    assert float((torch.ones((), device=DEVICE) + torch.ones(())).cpu()) == 2  # a number may
    return str(caught.value)


def test_launches(device_ranks: RankPool) -> None:
    device_ranks.run(1, launches)


def launches() -> None:
    x = torch.ones(4, 4, device=DEVICE)
    with counted() as counts:
        torch.empty_like(x)
        x.t()[1:].detach()
    assert counts.launches.total() == 0
    with counted() as counts:
        torch.zeros_like(x).add_(x).mm(x)
        halves = [x.bfloat16(), x.bfloat16()]
        foreach._foreach_mul_([x, x, *halves], 2)
    # two dtypes take two kernels
    assert {name: times for (name, _), times in counts.launches.items()} == {
        "zeros_like": 1,
        "add_": 1,
        "mm": 1,
        "_to_copy": 2,
        "_foreach_mul_": 2,
    }


def test_waits(device_ranks: RankPool) -> None:
    device_ranks.run(1, waits)


def waits() -> None:
    x = torch.arange(6.0).to(DEVICE)
    mask = x > 2
    with counted() as counts:
        x.sum().item()
        x.tolist()
        bool((x == x).all())
        x[mask]
        mask.nonzero()
        x[torch.tensor([0, 1])]
        x.cpu()
        torch.tensor([1.0], device=DEVICE)
        torch.accelerator.synchronize()
    assert {name: times for (name, _), times in counts.waits.items()} == {
        "_local_scalar_dense": 2,
        "tolist": 1,
        "index by a mask": 1,
        "nonzero": 1,
        "index from the host": 1,
        "to the host": 1,
        "to the device": 1,
        "synchronize": 1,
    }
    with counted() as counts:
        x[mask] = 0.0  # CUDA fills it
        x[x.long()]
        x[1:3].add(1)
        torch.ones(2).pin_memory().to(DEVICE, non_blocking=True)
        x.to("cpu", non_blocking=True)
    assert not counts.waits
    with counted() as counts:
        torch.ones(2).to(DEVICE, non_blocking=True)  # is not pinned
        torch.ones(2).pin_memory().to(DEVICE)  # waits all the same
    assert counts.waits.total() == 2


@pytest.mark.parametrize("with_kernels", [True, False])
def test_nf4_copies_its_values_to_the_device_once(
    device_ranks: RankPool, with_kernels: bool
) -> None:
    device_ranks.run(1, decoding_nf4, with_kernels)


def decoding_nf4(with_kernels: bool) -> None:
    codecs._values.cache_clear()
    codecs._pairs.cache_clear()
    storage, weight = Blocks(codecs.NF4, torch.float32), torch.ones(2, 128, device=DEVICE)
    kernels = codecs._kernels if with_kernels else lambda: None
    with patch.object(codecs, "_kernels", kernels):
        for times in range(2):
            with counted() as counts:
                codes, scale = stored = list(storage.split(weight).values())
                storage.join(stored)
                rows = storage.codec.elements(codes.view(-1)).view(2, 128)
                storage.decode(rows, 0, scale, 0)
            # the check that all scales are finite; the first time the values of the codes
            assert counts.waits.total() == (1 if times else 2)


def test_bytes(device_ranks: RankPool) -> None:
    device_ranks.run(1, moved_and_held)


def moved_and_held() -> None:
    x = torch.ones(256, device=DEVICE)
    with counted() as counts:
        before = counts.alive
        y = x + 1
        view = y[:2]
        del y
        assert counts.alive == before + 1024  # a view holds all of its storage
        del view
        assert counts.alive == before
        z = (x * 2) + x
        assert counts.alive == before + 1024
    assert counts.peak == before + 2048
    with counted() as counts:
        storage = z.untyped_storage()
        storage.resize_(0)  # as FSDP2 frees a weight
        assert counts.alive == before
        storage.resize_(512)
        assert counts.alive == before + 512
    with counted() as counts:
        x.copy_(torch.zeros(256))
        x[:8].cpu()
    assert (counts.bytes_to_device, counts.bytes_to_host) == (1024, 32)


def test_a_backward_pass_holds_its_activations(device_ranks: RankPool) -> None:
    device_ranks.run(1, activations)


def activations() -> None:
    linear = nn.Linear(8, 8, bias=False)
    weight = linear.weight
    linear.to(DEVICE)
    assert linear.weight is weight  # as on CUDA
    assert weight.device.type == device.NAME
    x = torch.ones(4, 8, device=DEVICE)
    with counted() as counts:
        before = counts.alive
        loss = linear(x).square().sum()
        assert counts.alive == before + 4 * 8 * 4 + 4  # what `square` saved, and the loss
        loss.backward()
        assert counts.alive == before + 4 + 8 * 8 * 4  # the gradient
    assert counts.waits.total() == 0


def test_collectives(device_ranks: RankPool) -> None:
    device_ranks.run(2, collectives)


def collectives() -> None:
    x = torch.ones(4, device=DEVICE)
    with counted() as counts:
        dist.all_reduce(x)
        assert x.tolist() == [2.0] * 4
        gathered: list[object] = [None, None]
        dist.all_gather_object(gathered, "words")
    assert gathered == ["words", "words"]
    assert {name for name, _ in counts.collectives} == {"allreduce_"}
    assert counts.bytes_collected == 16
    # what the collective of objects is made of is one wait
    assert {name: times for (name, _), times in counts.waits.items()} == {
        "tolist": 1,
        "all_gather_object": 1,
    }


def test_a_wait_names_the_line_of_the_package(device_ranks: RankPool) -> None:
    (lines,) = device_ranks.run(1, lines_of_waits)
    assert lines == ["", "ranks/comm.py all_or_raise"]


def lines_of_waits() -> list[str]:
    x = torch.ones(1, device=DEVICE)
    with counted() as counts:
        x.item()
        Communicator().all_or_raise(x.item)
    return sorted(
        {f"{where.split(':')[0]} {where.split()[-1]}" if where else "" for _, where in counts.waits}
    )
