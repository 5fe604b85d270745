"""Packs several samples into one window. Their positions start again at 0, so that attention does not cross them."""

from bisect import bisect_left, insort

import torch

from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.train.data.samples import Ragged, Samples, starts_of


def pack_samples(samples: Samples) -> Samples:
    """Puts the samples into as few windows as best-fit finds. Windows of text stay what they are.

    The first token of a sample is not learnt, as the last one of another stands before it.
    """
    if not isinstance(samples.input_ids, Ragged):
        return samples
    packs = best_fit(samples.input_ids.starts.diff().tolist(), samples.window)
    members = torch.tensor([sample for pack in packs for sample in pack], dtype=torch.int64)
    starts = samples.input_ids.starts
    begins = starts_of(starts.diff()[members])  # of the members, in the packs
    lengths = begins.diff()
    positions = torch.arange(int(begins[-1])) - begins[:-1].repeat_interleave(lengths)
    taken = starts[members].repeat_interleave(lengths) + positions
    rows = {name: rows.values[taken] for name, rows in samples.rows().items()}
    rows["labels"][begins[:-1]] = IGNORE_INDEX
    ends = begins[torch.tensor([len(pack) for pack in packs], dtype=torch.int64).cumsum(0)]
    tensors = rows | {"position_ids": positions.int(), "starts": torch.cat([begins[:1], ends])}
    return Samples.of_tensors(tensors, window=samples.window, left_out=samples.left_out)


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
