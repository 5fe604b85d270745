"""A model of DeepSpeed's parameter coordinator: it gathers and frees sizes instead of tensors.

It follows `PartitionedParameterCoordinator` of DeepSpeed 0.19.8. A first pass is recorded. Later ones prefetch along
the record. A parameter stays if it is needed again within `stage3_max_reuse_distance` elements. Prefetching stops at
`stage3_max_live_parameters`. A release is decided once per module and position. The decision is remembered also across
a cut, as in DeepSpeed's `lru_cache`. tests/benchmarks/plan_measured.py compares with DeepSpeed, byte by byte.

With hpZ a group of ranks keeps a second copy of what was gathered once, and gathers it from there. A cut ends the copy
of what it cuts, an update that of LoRA.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from loraprune_ds.plan.passes import Module, Parameter, Visit
from loraprune_ds.zero.ds_config import FetchLimits
from loraprune_ds.zero.flat import partition_numel


@dataclass
class PassTraffic:
    """Holds the bytes that one pass gathered.

    Attributes:
        called: modules of the decoder layers that the pass calls, forward, backward and recomputed. No bytes.
        sent: own shards, once for each other rank.
        sent_in_group: own pieces of the second copy, once for each other rank of hpZ's group.
        peak_live: most at once beyond the shards, in gathered parameters and buffers.
        largest_gather: of one collective, with padding. What is gathered at once takes a collective for each dtype.
    """

    called: int = 0
    sent: int = 0
    sent_in_group: int = 0
    peak_live: int = 0
    largest_gather: int = 0


@dataclass(eq=False)
class _Gather:
    """A collective. Its buffer is held until all its parameters were asked for."""

    waiting: set[Parameter]
    buffer: int


class Fetcher:
    """The coordinator of one rank. All ranks do the same.

    A pass in another order than the recorded one needs `forget_trace` before it.
    """

    def __init__(self, limits: FetchLimits, world_size: int, *, offloaded: bool = False) -> None:
        self.limits = limits
        self.world_size = world_size
        self._copies = world_size > 1 or offloaded  # else a parameter's data is its only shard itself
        self._record: list[Module] = []
        self._released: dict[tuple[Module, int], set[Parameter]] = {}
        self._in_flight: dict[Parameter, _Gather] = {}
        self._here: dict[Parameter, int] = {}  # bytes held for it, apart from the buffer of several
        self._users: dict[Parameter, set[Module]] = defaultdict(set)
        self._recomputed: dict[Module, set[Parameter]] = defaultdict(set)
        self._open: dict[Module, None] = {}  # in backward, in the order of their beginning
        self._live = 0
        self._traffic = PassTraffic()
        self._second: dict[Parameter, int] = {}  # elements of the whole parameter when its second copy was made
        self._lora_has_second = limits.copy_ranks > 1  # from the engine's start to the first update

    def run(self, visits: Iterable[Visit]) -> PassTraffic:
        """Runs one micro-batch, with or without a backward pass."""
        self._traffic = PassTraffic(peak_live=self._live)
        self._follows = bool(self._record)
        self._step = self._available = 0
        self._last_fetched: dict[Parameter, int] = defaultdict(lambda: -1)
        self._queue = deque((p, position) for position, module in enumerate(self._record) for p in module.parameters)
        for visit in visits:
            if visit.enters:
                self._enter(visit)
            else:
                self._leave(visit.module, self._to_release(visit.module))
        for module in reversed(list(self._open)):  # autograd does not tell the end of their backward
            self._leave(module, {p for p in module.parameters if not self._persists(p)})
        return self._traffic

    def forget_trace(self) -> None:
        """Frees everything and records the next pass, as happens around an evaluation."""
        self._record = []
        self.free_all()

    def free_all(self) -> None:
        """Frees everything, as a cut does. The next pass follows the same record."""
        assert not self._in_flight, "what a pass prefetches it also uses"
        for parameter in list(self._here):
            self._release(parameter)

    def end_step(self) -> int:
        """Follows an optimizer step. It frees everything and gathers again what stays gathered.

        It ends the second copies of what it updates.

        Returns:
            The bytes sent for it.
        """
        self.free_all()
        self._lora_has_second = False
        self._second = {parameter: numel for parameter, numel in self._second.items() if not parameter.trainable}
        stay = {p for module in self._record for p in module.parameters if self._persists(p)}
        for parameter in stay:
            self._here[parameter] = self._copies * parameter.numel * parameter.element_size
            self._hold(self._here[parameter])
        return sum(self._shard_bytes(p) for p in stay) * (self.world_size - 1)

    def _enter(self, visit: Visit) -> None:
        module = visit.module
        if not self._follows:
            self._record.append(module)
        if visit.phase == "backward":
            self._open[module] = None
        self._gather([p for p in module.parameters if self._is_gone(p)])
        for parameter in module.parameters:
            self._users[parameter].add(module)
            if visit.phase == "recompute" and not parameter.trainable:
                owner = next(reversed(self._open))  # frozen weights stay until this module's backward is over
                self._recomputed[owner].add(parameter)
                self._users[parameter].add(owner)
            if parameter in self._in_flight:
                self._wait(parameter)
        if self._follows:
            self._advance_queue(module)
            self._prefetch()
        self._step += 1

    def _advance_queue(self, module: Module) -> None:
        """Takes the parameters of this module from the queue, up to this step."""
        expected = sum(self._last_fetched[p] < self._step for p in module.parameters)
        seen: set[Parameter] = set()
        while self._queue and len(seen) < expected:
            parameter, position = self._queue.popleft()
            self._last_fetched[parameter] = position
            seen.add(parameter)
        assert seen <= set(module.parameters), "the pass left its recorded order"

    def _prefetch(self) -> None:
        room = min(self.limits.max_live - self._available, self.limits.prefetch_bucket)
        chosen: dict[Parameter, None] = {}
        numel = 0
        while self._queue and numel < room:
            parameter, position = self._queue.popleft()
            self._last_fetched[parameter] = max(self._last_fetched[parameter], position)
            if self._is_gone(parameter) and parameter not in chosen:
                chosen[parameter] = None
                numel += parameter.numel
        self._gather(list(chosen))

    def _leave(self, module: Module, released: set[Parameter]) -> None:
        self._open.pop(module, None)
        recomputed = self._recomputed.pop(module, set())
        for parameter in {*module.parameters, *recomputed}:
            self._users[parameter].discard(module)
            if parameter in released or (parameter in recomputed and not self._persists(parameter)):
                self._release(parameter)

    def _to_release(self, module: Module) -> set[Parameter]:
        """Finds the parameters that are not needed again soon."""
        if not self._follows:
            return set(module.parameters)
        key = (module, self._step)
        if key in self._released:
            return self._released[key]
        released = {p for p in module.parameters if not self._persists(p) and self._last_fetched[p] <= self._step}
        traversed = 0
        for position in range(self._step, len(self._record)):
            if traversed >= self.limits.max_reuse_distance or not released:
                break
            released.difference_update(self._record[position].parameters)
            traversed += sum(p.numel for p in self._record[position].parameters)
        self._released[key] = released
        return released

    def _shard_bytes(self, parameter: Parameter) -> int:
        return self._copies * partition_numel(parameter.numel, self.world_size) * parameter.element_size

    def _persists(self, parameter: Parameter) -> bool:
        return parameter.numel <= self.limits.persistence_threshold

    def _is_gone(self, parameter: Parameter) -> bool:
        return parameter not in self._here and parameter not in self._in_flight

    def _gather(self, parameters: list[Parameter]) -> None:
        """Starts a collective in hpZ's group for those that have a second copy, and one of all ranks for the others."""
        copied = [p for p in parameters if self._second.get(p) == p.numel or (p.trainable and self._lora_has_second)]
        others = [p for p in parameters if p not in copied]
        self._traffic.sent_in_group += self._start(copied, self.limits.copy_ranks)
        self._traffic.sent += self._start(others, self.world_size)

    def _start(self, parameters: list[Parameter], ranks: int) -> int:
        """Starts a collective of so many ranks. Returns the bytes that each of them sends."""
        if not parameters:
            return 0
        pieces: dict[int, int] = defaultdict(int)  # by bytes of an element
        for p in parameters:
            pieces[p.element_size] += self._shard_bytes(p)
        own = sum(pieces.values()) * (self.world_size // ranks)
        gather = _Gather(set(parameters), own * ranks)
        self._traffic.largest_gather = max(self._traffic.largest_gather, max(pieces.values()) * self.world_size)
        self._hold(gather.buffer)
        self._available += sum(p.numel for p in parameters)
        self._in_flight |= dict.fromkeys(parameters, gather)
        return own * (ranks - 1)

    def _wait(self, parameter: Parameter) -> None:
        gather = self._in_flight.pop(parameter)
        if parameter not in self._here:  # all parameters of a collective arrive together
            self._arrive(gather)
        gather.waiting.discard(parameter)
        if not gather.waiting:
            self._hold(-gather.buffer)

    def _arrive(self, gather: _Gather) -> None:
        if len(gather.waiting) == 1:  # the parameter is a view of what arrives
            self._here[next(iter(gather.waiting))], gather.buffer = gather.buffer, 0
            return
        for parameter in gather.waiting:  # each is copied out of the buffer
            self._here[parameter] = self._copies * parameter.numel * parameter.element_size
            self._hold(self._here[parameter])

    def _release(self, parameter: Parameter) -> None:
        if parameter in self._here and not self._users[parameter]:
            self._available -= parameter.numel
            self._hold(-self._here.pop(parameter))
            if self.limits.copy_ranks > 1:
                self._second[parameter] = parameter.numel

    def _hold(self, count: int) -> None:
        self._live += count
        self._traffic.peak_live = max(self._traffic.peak_live, self._live)
