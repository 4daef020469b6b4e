"""What this engine sends over each level, collective by collective: the bytes of `parallel.unit`, without tensors.

A unit's flat buffers make chains of collectives (`Chain`), as in `parallel.collectives`:

    gather        P, slowest level first; every use of the unit
    reduce        G, fastest first; every micro-batch
    reduce_last   O outside G, fastest first, then the replicas; once a step
    refresh       O outside P, slowest first; once a step

and its block, where ranks share sequences,

    sequence      q, k, v and attention's result over their level; every forward, and two or three times with a backward

Formats are those of `parallel.transport`, where [Note: quantized weights] says what is packed on which part of its way.
"""

import math
from dataclasses import dataclass, replace

from parallel.layout import ALIGN
from parallel.mesh import Mesh
from parallel.placement import Placement
from parallel.planning.workload import UnitCost, Workload
from parallel.quantize import Format
from parallel.transport import Transport

EXACT = Transport(weights=(), grads=())
"""Nothing is quantized, on any mesh."""


@dataclass(frozen=True)
class Move:
    """One collective, as one rank sees it."""

    kind: str
    """``all_gather``, ``all_to_all`` or ``all_reduce``."""
    members: int
    sent: tuple[float, ...]
    """Bytes that a rank sends over each level, on average over the ranks, outermost level first."""
    edge: float
    """Bytes that the busiest rank sends over the slowest level that is crossed, if it has that link alone."""
    before: float = 0.0
    """Bytes read and written in memory to prepare it (packing) …"""
    after: float = 0.0
    """… and to use what came (sums, unpacking)."""
    bits: int = 0
    """Of the codes where what is sent is packed: preparing and using it is then the quantizer's work. 0: it is not."""

    @property
    def level(self) -> int:
        """The slowest level that is crossed."""
        return next(i for i, sent in enumerate(self.sent) if sent)

    @property
    def steps(self) -> int:
        """Of a ring: one more than which there are ranks in it."""
        return (2 if self.kind == "all_reduce" else 1) * (self.members - 1)


Chain = tuple[Move, ...]


@dataclass(frozen=True)
class UnitTraffic:
    """The chains of one unit, one for each of its flat buffers that has something to send."""

    gather: tuple[Chain, ...]
    reduce: tuple[Chain, ...]
    reduce_last: tuple[Chain, ...]
    refresh: tuple[Chain, ...]
    elements: int
    """Trained elements with the padding: what gradients are collected into."""
    gather_backward: tuple[Chain, ...] | None = None
    """Where the backward gathers otherwise than the forward does, as other systems do; None: alike."""
    sequence: tuple[Chain, ...] = ()
    """What one pass of the unit's `Exchange` sends."""

    @property
    def last(self) -> tuple[Chain, ...]:
        """The chains of the last micro-batch: one chain a flat buffer goes through both parts."""
        if not self.reduce:
            return self.reduce_last
        if not self.reduce_last:
            return self.reduce
        return tuple(inner + outer for inner, outer in zip(self.reduce, self.reduce_last, strict=True))


class Traffic:
    """What a placement sends on a mesh, unit by unit."""

    def __init__(self, work: Workload, mesh: Mesh, placement: Placement, transport: Transport, *, gloo: bool) -> None:
        self.work, self.mesh, self.placement, self.gloo = work, mesh, placement, gloo
        self.transport = transport
        self._weights = transport.weights or (None,) * mesh.num_levels
        self._grads = transport.grads or (None,) * mesh.num_levels
        self._cache: dict[UnitCost, UnitTraffic] = {}
        route = range(mesh.num_levels - placement.optim, mesh.num_levels)
        self._packed_to = max((i for i in route if self._weights[i]), default=-1)
        """The innermost level that packed weights cross."""
        self.weights_format: Format | None = self._weights[self._packed_to] if self._packed_to >= 0 else None

    @property
    def shard_packed(self) -> bool:
        """Whether the parameter shard of what is quantized is kept packed."""
        return self._packed_to >= self.mesh.num_levels - self.placement.params

    def master_apart(self, packs: bool) -> bool:
        """Whether a buffer's fp32 master weights are memory beside the weights that are computed with."""
        return self.work.compute_bytes != 4 or (packs and self.weights_format is not None)

    def packed_weights(self, numel: int, chunk: int) -> int:
        """Bytes of `numel` packed weights, of which each rank packed its optimizer range of `chunk` by itself."""
        assert self.weights_format is not None
        return numel // chunk * self.weights_format.packed_bytes(chunk)

    def packed_grads(self, numel: int, level: int) -> int | None:
        """Bytes of `numel` gradients packed for each member of a level; None where they cross it exactly."""
        format, members = self._grads[level], self.mesh.sizes[level]
        return None if format is None else members * format.packed_bytes(numel // members)

    def unit(self, unit: UnitCost) -> UnitTraffic:
        if unit not in self._cache:
            self._cache[unit] = self._unit(unit)
        return self._cache[unit]

    def padded(self, numel: int, packs: bool = False) -> int:
        """Elements of a flat buffer of this many, padded so that ranks cut it into whole blocks (`parallel.layout`)."""
        step = max(ALIGN, self.transport.block if packs else 1) * self.mesh.world
        return -(-numel // step) * step

    def flats(self, unit: UnitCost) -> list[tuple[int, bool, bool]]:
        """The unit's flat buffers: padded elements, whether they train, whether they may be quantized."""
        if not self.transport.quantizes:
            sizes = [(unit.trained, True, False), (unit.frozen, False, False)]
        else:
            sizes = [(unit.matrices, True, True), (unit.vectors, True, False), (unit.frozen, False, False)]
        return [(self.padded(numel, packs), trained, packs) for numel, trained, packs in sizes if numel]

    def shard(self, numel: int, levels: int) -> int:
        """Elements of a rank's range of `numel`, sharded over the innermost levels."""
        return numel // math.prod(self.mesh.sizes[self.mesh.num_levels - levels :])

    def sharded(self, levels: int) -> bool:
        return math.prod(self.mesh.sizes[self.mesh.num_levels - levels :]) > 1

    def sent_bytes(self) -> dict[str, list[float]]:
        """Bytes that a rank sends in a step, by phase and level: what `links` of the machine are asked for.

        Phases: ``gather``, ``reduce`` and ``sequence`` (all micro-batches), ``reduce_last``, ``refresh``, ``control``.
        """
        phases = {name: [0.0] * self.mesh.num_levels for name in PHASES}
        for unit in self.work.units:
            traffic = self.unit(unit)
            again = unit.gathers_backward and not unit.is_root
            uses = self.work.micro_batches * unit.count * (2 if again else 1)
            if unit is self.work.units[-1] and again:
                uses -= self.work.micro_batches  # the last one stays gathered for its backward
            counts = {
                "gather": uses, "reduce": self.work.micro_batches * unit.count,
                "reduce_last": unit.count, "refresh": unit.count,
                "sequence": self.work.micro_batches * unit.count * (1 + unit.passes_backward),
            }  # fmt: skip
            for phase, count in counts.items():
                for chain in getattr(traffic, phase):
                    for move in chain:
                        phases[phase] = [a + count * b for a, b in zip(phases[phase], move.sent, strict=True)]
        for move in self.control():
            phases["control"] = [a + b for a, b in zip(phases["control"], move.sent, strict=True)]
        return phases

    def control(self) -> list[Move]:
        """What every step sends beside weights and gradients: who got gradients, the norm, persistent buffers."""
        levels = self.mesh.num_levels
        moves = [self.all_reduce(self.work.num_parameters, 0, levels)] if self.work.num_parameters else []
        if self.sharded(self.placement.optim):
            moves.append(self.all_reduce(8, levels - self.placement.optim, levels))
        if self.work.buffer_bytes and self.mesh.world > 1:
            flat = self.all_gather(self.work.buffer_bytes, 0)  # a tree: every rank but the root gets it once
            moves.append(Move("all_gather", self.mesh.world, flat.sent, self.work.buffer_bytes))
        return [move for move in moves if any(move.sent)]

    def residual_bytes(self, numel: int) -> int:
        """What error feedback keeps of a quantized flat buffer: fp32, of all that a rank sends packed."""
        if not self.transport.error_feedback:
            return 0
        levels = range(self.mesh.num_levels)
        return sum(4 * numel // math.prod(self.mesh.sizes[i + 1 :]) for i in levels if self._grads[i])

    def scratch(self, numel: int) -> dict[float, int]:
        """Buffers of packed bytes, by size, that a quantized flat buffer's chains take from their lane's pool."""
        counts: dict[float, int] = {}
        mesh, outside = self.mesh, self.mesh.num_levels - self.placement.optim
        for level in range(mesh.num_levels):
            inside = math.prod(mesh.sizes[level + 1 :])
            if size := self.packed_grads(numel // inside, level):
                counts[size] = counts.get(size, 0) + 3  # packed, and two received
        if formats := [format for format in self._grads[:outside] if format]:
            part, finest = numel // mesh.world, max(formats, key=lambda format: format.bits)
            for level in range(outside + 1):
                size = math.prod(mesh.sizes[:level]) * finest.packed_bytes(part)
                counts[size] = counts.get(size, 0) + 2
        if self.weights_format:
            arrived = numel // math.prod(mesh.sizes[self._packed_to + 1 :])
            size = self.packed_weights(arrived, self.shard(numel, self.placement.optim))
            counts[size] = counts.get(size, 0) + 1
        return counts

    # ------------------------------------------------------------------------------------------------ collectives

    def all_gather(self, whole: float, level: int, *, after: float = 0.0, bits: int = 0) -> Move:
        """Of `whole` bytes over one level: each rank sends all parts but one, in a ring."""
        return self._one("all_gather", whole, level, 0.0, after, bits)

    def all_to_all(self, whole: float, level: int, *, after: float = 0.0, before: float = 0.0, bits: int = 0) -> Move:
        """Of `whole` bytes over one level: a rank sends every part but its own."""
        return self._one("all_to_all", whole, level, before, after, bits)

    def _one(self, kind: str, whole: float, level: int, before: float, after: float, bits: int) -> Move:
        members = self.mesh.sizes[level]
        sent = [0.0] * self.mesh.num_levels
        sent[level] = whole * (members - 1) / members
        return Move(kind, members, tuple(sent), sent[level], before, after, bits)

    def all_reduce(self, whole: float, first: int, last: int) -> Move:
        """A ring over the ranks that differ in the levels ``first:last``: a neighbour lies over the slowest level that
        changes from one to the next, so one member in each group crosses the slow level for all."""
        sizes = self.mesh.sizes[first:last]
        members = math.prod(sizes)
        sent, edge = [0.0] * self.mesh.num_levels, 2 * whole * (members - 1) / max(1, members)
        for i in range(len(sizes)):
            changes = members // math.prod(sizes[i + 1 :]) if sizes[i] > 1 else 0
            slower = members // math.prod(sizes[i:]) if math.prod(sizes[:i]) > 1 else 0
            sent[first + i] = edge * max(0, changes - slower) / members
        return Move("all_reduce", members, tuple(sent), edge)

    # ------------------------------------------------------------------------------------------------ chains

    def _unit(self, unit: UnitCost) -> UnitTraffic:
        flats = self.flats(unit)
        trained = [(numel, packs) for numel, trains, packs in flats if trains]
        gathered = [(numel, packs) for numel, _, packs in flats] if self.sharded(self.placement.params) else []
        chains = {
            "gather": tuple(self._gather(numel, packs) for numel, packs in gathered),
            "reduce": tuple(self._reduce(numel, packs) for numel, packs in trained),
            "reduce_last": tuple(self._reduce_last(numel, packs) for numel, packs in trained),
            "refresh": tuple(self._refresh(numel, packs) for numel, packs in trained),
            "sequence": (self._exchange(unit),),
        }
        kept = {name: made if any(made) else () for name, made in chains.items()}
        return UnitTraffic(**kept, elements=sum(numel for numel, _ in trained))

    def _exchange(self, unit: UnitCost) -> Chain:
        """`SequenceParallel.attend`, or `SpreadAttention`: its collectives, all of them as large as their mean."""
        if (exchange := unit.exchange) is None:
            return ()
        size, level = (
            exchange.token_bytes * self.work.tokens / exchange.collectives,
            self.mesh.names.index(exchange.level),
        )
        one = self.all_to_all(size, level, before=2 * size, after=2 * size)  # copied as it is sent, and as it came
        return (one,) * exchange.collectives

    def _gather(self, numel: int, packs: bool) -> Chain:
        """`Flat.gather`: over the levels of P, slowest first."""
        return self._spread(numel, packs, self.mesh.num_levels - self.placement.params, self.mesh.num_levels)

    def _refresh(self, numel: int, packs: bool) -> Chain:
        """`TrainableFlat.refresh`: over the levels of O outside P, slowest first."""
        levels = self.mesh.num_levels
        return self._spread(numel, packs, levels - self.placement.optim, levels - self.placement.params)

    def _spread(self, numel: int, packs: bool, first: int, last: int) -> Chain:
        """All-gathers over the levels ``first:last``, packed up to `_packed_to`."""
        moves: list[Move] = []
        item, sizes = self.work.compute_bytes, self.mesh.sizes
        for level in range(first, last):
            if sizes[level] == 1:
                continue
            target = numel // math.prod(sizes[level + 1 :])
            if packs and level <= self._packed_to:
                assert self.weights_format is not None
                bits = self.weights_format.bits
                whole = float(self.packed_weights(target, self.shard(numel, self.placement.optim)))
                unpacks = all(size == 1 for size in sizes[level + 1 : self._packed_to + 1])
                after = (whole + item * target) * unpacks
                moves.append(self.all_gather(whole, level, after=after, bits=bits))
            else:
                moves.append(self.all_gather(item * target, level))
        return tuple(moves)

    def _reduce(self, numel: int, packs: bool) -> Chain:
        """`TrainableFlat.reduce_inner`: over the levels of G, fastest first."""
        return self._scatter(numel, packs, self.mesh.num_levels, self.mesh.num_levels - self.placement.grads)

    def _scatter(self, numel: int, packs: bool, last: int, first: int, inside: int | None = None) -> Chain:
        """Reduce-scatters over the levels ``first:last``, fastest first; `inside`: elements that enter, if not the
        range of the levels further in."""
        moves: list[Move] = []
        item, mesh = self.work.reduce_bytes, self.mesh
        for level in range(last - 1, first - 1, -1):
            size = mesh.sizes[level]
            if size == 1:
                continue
            outer = last if inside is not None else mesh.num_levels
            piece = numel // math.prod(mesh.sizes[level + 1 : outer])
            format = self._grads[level]
            packed = self.packed_grads(piece, level) if packs else None
            if format is not None and packed is not None:
                feedback = 8 * piece if self.transport.error_feedback else 0
                before = 4 * piece + packed + feedback
                after = packed + 4 * (piece if self.gloo else piece / size)  # CPUs write each chunk's values first
                moves.append(self.all_to_all(packed, level, before=before, after=after, bits=format.bits))
            else:  # NCCL sums on the way; gloo's pieces are summed here
                local = item * piece * (1 + 1 / size) if self.gloo else 0.0
                moves.append(self.all_to_all(item * piece, level, after=local))
        return tuple(moves)

    def _reduce_last(self, numel: int, packs: bool) -> Chain:
        """`TrainableFlat.reduce_outer`: over O outside G, fastest first, then the sum over the replicas."""
        levels, placement, mesh = self.mesh.num_levels, self.placement, self.mesh
        chain = self._scatter(numel, packs, levels - placement.grads, levels - placement.optim)
        outside = levels - placement.optim
        if math.prod(mesh.sizes[:outside]) == 1:
            return chain
        piece = self.shard(numel, placement.optim)
        formats = [format for format in self._grads[:outside] if format] if packs else []
        if not formats:
            return (*chain, self.all_reduce(self.work.reduce_bytes * piece, 0, outside))
        # `replicate_sum`: scattered level by level, then gathered back in the finest format, slowest level first
        scatters = self._scatter(piece, packs, outside, 0, inside=piece)
        finest = max(formats, key=lambda format: format.bits)
        moves, members = [], math.prod(mesh.sizes[:outside])
        for level in range(outside):
            if mesh.sizes[level] > 1:
                parts = math.prod(mesh.sizes[: level + 1])
                moves.append(self.all_gather(parts * finest.packed_bytes(piece // members), level))
        part = piece // members
        moves[0] = replace(moves[0], bits=finest.bits, before=4.0 * part + finest.packed_bytes(part))
        after = 4.0 * piece + members * finest.packed_bytes(part)
        moves[-1] = replace(moves[-1], bits=finest.bits, after=after)
        return (*chain, *scatters, *moves)


PHASES = ("gather", "reduce", "sequence", "reduce_last", "refresh", "control")
