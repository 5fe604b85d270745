"""Dropout is drawn from (seed, step, micro-batch, rank) and from nothing else."""

import itertools

import torch

from loraprune_ds.train.seeding import seed_draws


def test_every_rank_step_micro_batch_and_seed_draws_its_own() -> None:
    draws = set()
    for key in itertools.product((0, 1), (1, 2), (0, 1), (0, 1, 2)):
        seed_draws(*key)
        draws.add(tuple(torch.rand(4).tolist()))
    assert len(draws) == 2 * 2 * 2 * 3


def test_a_draw_does_not_depend_on_what_was_drawn_before() -> None:
    seed_draws(0, 5, 1, 1)
    first = torch.rand(4)
    torch.rand(1000)
    seed_draws(0, 5, 1, 1)
    assert torch.equal(torch.rand(4), first)
