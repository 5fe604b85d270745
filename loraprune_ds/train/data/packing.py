"""Packs several samples into one window. Their positions start again at 0, so that attention does not cross them."""

from bisect import bisect_left, insort

import torch

from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.train.data.samples import Samples, positions_of, starts_of


def pack_samples(samples: Samples) -> Samples:
    """Puts the samples into as few windows as best-fit finds.

    The first token of a sample is not learnt, as the last one of another stands before it.
    """
    packs = best_fit(samples.lengths().tolist(), samples.window)
    members = torch.tensor([sample for pack in packs for sample in pack], dtype=torch.int64)
    lengths = samples.lengths()[members]
    begins, positions = starts_of(lengths), positions_of(lengths)  # of the members, in the packs
    taken = samples.starts[members].repeat_interleave(lengths) + positions
    columns = {name: column[taken] for name, column in samples.columns.items()} | {"position_ids": positions}
    columns["labels"][begins[:-1]] = IGNORE_INDEX
    ends = torch.tensor([len(pack) for pack in packs], dtype=torch.int64).cumsum(0)
    return Samples(columns, torch.cat([begins[:1], begins[ends]]), samples.window, samples.left_out)


def best_fit(lengths: list[int], window: int) -> list[list[int]]:
    """Returns packs of numbers of samples. The longest goes first, each to the fullest pack that has room."""
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # by room
    rooms: list[int] = []  # those of open packs, ascending
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        i = bisect_left(rooms, lengths[sample])
        room = rooms[i] if i < len(rooms) else window
        if i < len(rooms):
            pack = open_packs[room].pop()
            if not open_packs[room]:
                rooms.pop(i)
        else:
            pack = len(packs)
            packs.append([])
        packs[pack].append(sample)
        left = room - lengths[sample]
        if not open_packs.setdefault(left, []):
            insort(rooms, left)
        open_packs[left].append(pack)
    return packs
