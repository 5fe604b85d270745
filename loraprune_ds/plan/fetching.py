"""What DeepSpeed's parameter coordinator would gather and free during a pass, computed instead of done.

A model of `PartitionedParameterCoordinator` (DeepSpeed 0.19.8): a first pass is recorded, later ones prefetch along the
record; a parameter stays while it is needed again within `stage3_max_reuse_distance` elements; prefetching stops at
`stage3_max_live_parameters`. Decisions of release are made once per module and position and remembered, also across a
cut, as DeepSpeed's `lru_cache` does. tests/benchmarks/plan_measured.py compares it with the real thing, byte by byte.
"""

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from loraprune_ds.plan.passes import Module, Parameter, Visit
from loraprune_ds.zero.ds_config import FetchLimits
from loraprune_ds.zero.flat import partition_numel

NEVER = -(10**10)


@dataclass
class PassTraffic:
    """What one pass gathered.

    Attributes:
        gathers: collectives.
        sent: elements that this rank sent: its piece to each of the others.
        gathered: elements gathered, padding included.
        peak_live: most elements held at once beyond the pieces: gathered parameters and the buffers they arrive in.
        largest_gather: elements of the largest single gather.
    """

    gathers: int = 0
    sent: int = 0
    gathered: int = 0
    peak_live: int = 0
    largest_gather: int = 0


@dataclass(eq=False)
class _Gather:
    """A collective under way or arrived: `buffer` elements are held until all its parameters were asked for."""

    waiting: set[Parameter]
    buffer: int = 0
    arrived: bool = False


@dataclass(eq=False)
class _State:
    status: Literal["gone", "in flight", "here"] = "gone"
    users: set[Module] = field(default_factory=set)
    live: int = 0  # elements held for it, apart from a shared buffer


class Fetcher:
    """One rank's coordinator; all ranks do the same."""

    def __init__(self, limits: FetchLimits, world_size: int, *, offloaded: bool = False) -> None:
        self.limits = limits
        self.world_size = world_size
        self._copies = world_size > 1 or offloaded  # else a parameter's data is its one piece itself
        self._mode: Literal["invalid", "record", "complete"] = "invalid"
        self._modules: list[Module] = []
        self._trace: list[tuple[Parameter, int]] = []
        self._released: dict[tuple[Module, int], set[Parameter]] = {}
        self._states: dict[Parameter, _State] = defaultdict(_State)
        self._in_flight: dict[Parameter, _Gather] = {}
        self._recomputed: dict[Module, set[Parameter]] = defaultdict(set)
        self._open: dict[Module, None] = {}
        self._live = 0
        self._traffic = PassTraffic()
        self._start_pass_state()

    def run(self, visits: Iterable[Visit]) -> PassTraffic:
        """One micro-batch's forward, with or without backward."""
        self._traffic = PassTraffic(peak_live=self._live)
        self._reset()
        for visit in visits:
            if visit.enters:
                self._enter(visit)
            else:
                self._leave(visit.module, forward=visit.phase != "backward")
        self._release_leftovers()
        return self._traffic

    def forget_trace(self) -> None:
        """What `ShardedModel` does at a cut and around an evaluation: frees everything, has the next pass recorded."""
        for parameter, state in self._states.items():
            if parameter in self._in_flight:
                self._wait(parameter)
            state.users.clear()
            self._release(parameter)
        if self._mode != "invalid":
            self._invalidate()

    def _start_pass_state(self) -> None:
        self._step = 0
        self._available = 0
        self._last_fetched: dict[Parameter, int] = defaultdict(lambda: NEVER)
        self._queue = deque(self._trace)

    def _reset(self) -> None:
        self._clean_in_flight()
        if self._mode == "record":
            self._trace = [(p, position) for position, module in enumerate(self._modules) for p in module.parameters]
            self._mode = "complete"
        elif self._mode == "invalid":
            self._mode = "record"
        self._start_pass_state()

    def _invalidate(self) -> None:
        self._mode = "invalid"
        self._modules, self._trace = [], []
        self._last_fetched = defaultdict(lambda: NEVER)
        self._queue = deque()
        self._clean_in_flight()

    def _clean_in_flight(self) -> None:
        for parameter in list(self._in_flight):
            self._wait(parameter)
            self._release(parameter)

    def _enter(self, visit: Visit) -> None:
        module = visit.module
        if self._mode == "complete" and (self._step >= len(self._modules) or self._modules[self._step] is not module):
            self._invalidate()
        if self._mode == "record":
            self._modules.append(module)
        if visit.phase == "backward":
            self._open[module] = None
        self._gather([p for p in module.parameters if self._states[p].status == "gone"])
        for parameter in module.parameters:
            users = self._states[parameter].users
            users.add(module)
            if visit.phase == "recompute" and not parameter.trainable:
                owner = next(reversed(self._open))  # frozen weights stay until this module's backward is over
                self._recomputed[owner].add(parameter)
                users.add(owner)
            if parameter in self._in_flight:
                self._wait(parameter)
        if self._mode == "complete":
            self._advance_queue(module)
            self._prefetch()
        self._step += 1

    def _advance_queue(self, module: Module) -> None:
        """What this module uses is not to be prefetched any more."""
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
            if self._states[parameter].status == "gone" and parameter not in chosen:
                chosen[parameter] = None
                numel += parameter.numel
        self._gather(list(chosen))

    def _leave(self, module: Module, *, forward: bool) -> None:
        parameters = set(module.parameters)
        released = self._to_release(module) if self._mode == "complete" else parameters
        if not forward:
            recomputed = self._recomputed.pop(module, set())
            released = released | {p for p in recomputed if not self._persists(p)}
            parameters |= recomputed
            self._open.pop(module, None)
        for parameter in parameters:
            self._states[parameter].users.discard(module)
            if parameter in released:
                self._release(parameter)

    def _to_release(self, module: Module) -> set[Parameter]:
        key = (module, self._step)
        if key not in self._released:
            self._released[key] = self._decide_release(module)
        return self._released[key]

    def _decide_release(self, module: Module) -> set[Parameter]:
        released = {p for p in module.parameters if not self._persists(p) and self._last_fetched[p] <= self._step}
        traversed = 0
        for position in range(self._step, len(self._modules)):
            if traversed >= self.limits.max_reuse_distance or not released:
                break
            for parameter in self._modules[position].parameters:
                released.discard(parameter)
                traversed += parameter.numel
        return released

    def _release_leftovers(self) -> None:
        """At the end of a backward: modules whose end autograd does not tell."""
        while self._open:
            module, _ = self._open.popitem()
            for parameter in {*module.parameters, *self._recomputed.pop(module, set())}:
                self._states[parameter].users.discard(module)
                if not self._persists(parameter):
                    self._release(parameter)

    def _persists(self, parameter: Parameter) -> bool:
        return parameter.numel <= self.limits.persistence_threshold

    def _gather(self, parameters: list[Parameter]) -> None:
        if not parameters:
            return
        gather = _Gather(set(parameters))
        shards = sum(partition_numel(p.numel, self.world_size) for p in parameters)
        if self._copies:
            buffer = shards * self.world_size
            self._traffic.gathers += self.world_size > 1
            self._traffic.sent += shards * (self.world_size - 1)
            self._traffic.gathered += buffer
            self._traffic.largest_gather = max(self._traffic.largest_gather, buffer)
            if len(parameters) == 1:  # the parameter is a view of what arrives
                self._states[parameters[0]].live = buffer
            else:
                gather.buffer = buffer
            self._hold(buffer)
        for parameter in parameters:
            self._states[parameter].status = "in flight"
            self._in_flight[parameter] = gather
            self._available += parameter.numel

    def _wait(self, parameter: Parameter) -> None:
        gather = self._in_flight.pop(parameter)
        if not gather.arrived:
            gather.arrived = True
            for other in gather.waiting:
                self._states[other].status = "here"
                if gather.buffer:  # each parameter is copied out of the buffer
                    self._states[other].live = other.numel
                    self._hold(other.numel)
        gather.waiting.discard(parameter)
        if not gather.waiting:
            self._hold(-gather.buffer)
            gather.buffer = 0

    def _release(self, parameter: Parameter) -> None:
        state = self._states[parameter]
        if state.status != "here" or state.users:
            return
        state.status = "gone"
        self._available -= parameter.numel
        self._hold(-state.live)
        state.live = 0

    def _hold(self, numel: int) -> None:
        self._live += numel
        self._traffic.peak_live = max(self._traffic.peak_live, self._live)
