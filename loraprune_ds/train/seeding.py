"""Random draws are seeded where they are used, so that nothing has to be remembered to go on after a stop."""

import hashlib

import torch


def seed_draws(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seeds torch for one micro-batch's dropout: ranks, steps and micro-batches all draw different masks."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
