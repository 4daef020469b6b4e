"""The engine: a model whose parameters, gradients and optimizer states are sharded by a `Placement`.

A step, unit by unit (design after arXiv 2501.04266, sec. 4, and ZeRO, arXiv 1910.02054):

    micro-batch   gather P · forward · release … gather P · backward · reduce-scatter G · release
    last one      … and reduce-scatter the levels of O outside G, all-reduce over the replicas
    step          global norm · update the owned ranges · refresh P from the ranks of O

So nothing crosses the levels outside G until the last micro-batch.

[Note: order of reductions]
Ranks must issue the collectives of a group in one order, but a rank may miss the gradient of a parameter that another
has. So units are reduced strictly in the reverse order of `units`; one that waits for a gradient which never comes
holds back those behind it until the backward ends.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from offload.activations.blocks import Activations
from offload.options import OffloadOptions
from offload.placing import NOT_SPECULATED, NOT_WEIGHTS_FIRST
from offload.state import MASTER, Fill, Movable, Piece, Read, filling
from offload.weak import weakly
from parallel import optimizer as optimizers
from parallel.collectives import BufferPool, Queue, Steps
from parallel.cut import cut_units, lay_out_buffers, make_unit, move_without_memory, wrap_blocks
from parallel.engine import Accept
from parallel.mesh import Mesh
from parallel.offloaded import Offloader, num_threads, ranks_here
from parallel.options import OptimizerOptions, ParallelOptions
from parallel.placement import Placement
from parallel.transport import Transport
from parallel.unit import TrainableFlat, Unit
from parallel.weights import Weights

log = logging.getLogger(__name__)
BUFFER = "buffer"
"""Kind of state of a module's persistent buffers."""
KEEP = OffloadOptions()


class ShardedModel:
    """This rank's share of a model in training; `shard` makes it. Implements `parallel.engine.Engine`."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        placement: Placement,
        *,
        units: Sequence[nn.Module],
        optimizer: OptimizerOptions,
        options: ParallelOptions,
        dtype: torch.dtype,
        device: torch.device,
        offload: OffloadOptions = KEEP,
        blocks: Sequence[nn.Module] = (),
        recompute: Sequence[nn.Module] = (),
        most_tokens: int | None = None,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.model, self.mesh, self.placement = model, mesh, placement
        self.updates = 0
        """Optimizer steps taken; set it after `load` to go on from there."""
        self._prefetch = options.prefetch_units
        self._staging = BufferPool(device)
        self._reductions = Queue(device, depth=2, overlap=options.overlap)
        self.transport = Transport.of(options, mesh, placement)
        self._first = self._last = True
        self._begins_backward = weakly(self._before_backward)

        _create_groups(mesh, placement)
        move_without_memory(model, dtype, device)
        lay_out_buffers(model)
        cut, root = cut_units(model, units)
        make = partial(
            make_unit, mesh=mesh, placement=placement, dtype=dtype, device=device,
            reduce_dtype=_DTYPES[options.reduce_dtype], transport=self.transport,
        )  # fmt: skip
        self.units = [make(*unit) for unit in cut]
        self.root = make("root", model, root) if root else None
        self._all = ([self.root] if self.root else []) + self.units
        self._trainable = [flat for unit in self._all for flat in unit.trainable]
        if quantized := [flat.layout.numel for flat in self._trainable if flat.transport and flat.transport.quantizes]:
            self.transport.check_blocks(max(quantized), mesh.world)
        persistent = model.state_dict(keep_vars=True)
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
        self._offloader = Offloader(self._all, offload, optimizer, device)
        with ExitStack() as undo:
            undo.callback(self._offloader.close)
            if offload.update != "just_in_time" and not self._offloader.updates(offload.update):
                say(NOT_SPECULATED if offload.update == "speculate" else NOT_WEIGHTS_FIRST)
            self.weights = Weights(self._all, self._offloader, device, overlap=options.overlap)
            self._resident = [flat for flat in self._trainable if flat.away is None]
            self.optimizer = optimizers.build(optimizer, self._resident)
            leave = offload.activations.leave
            sharing, threads = (ranks_here(), num_threads(offload)) if leave else (1, None)
            self.activations = Activations(
                offload.activations, device,
                pack=self.weights.pack, unpack=self.weights.unpack, sharing=sharing, device_bytes=offload.device_bytes,
                most_tokens=most_tokens, threads=threads, drives=self._offloader.drives(offload, sharing),
                least=_least if mesh.world > 1 else int, say=say,
            )  # fmt: skip
            undo.pop_all()
        self.activations.wrap(blocks)
        again = {*recompute, *(blocks if offload.activations.leave else ())}
        self._recomputed = {unit for unit in self.units if unit.module in again}
        self._hooks: list[RemovableHandle] = []
        for position, unit in enumerate(self.units):
            self._watch(unit, position)
        if self.root:
            self._watch(self.root, -1)

    # ------------------------------------------------------------------------------------------------ training

    def forward_backward(self, *inputs: Any, scale: float, first: bool, last: bool) -> Tensor:
        self._first, self._last = first, last
        for unit in self._all:
            unit.packed = unit in self._recomputed
            unit.num_pending = unit.num_trainable
        self._unreduced = [unit for unit in reversed(self._all) if unit.trainable]
        with self.weights.kept_as_handles():
            loss: Tensor = self.model(*inputs)
        (loss * scale).backward()
        for unit in self._unreduced:
            self._reduce(unit)
        self._unreduced = []
        for unit in self._all:
            self.weights.release(unit)
        return loss.detach()

    def evaluate(self, *inputs: Any) -> Tensor:
        with torch.no_grad():
            loss: Tensor = self.model(*inputs)
        return loss

    def expect(self, lr: float) -> None:
        self._offloader.expect(lr, self.updates + 1)

    def step(self, lr: float, clip_norm: float | None, accept: Accept | None = None) -> Tensor:
        self._reductions.finish()
        self._agree_on_received()
        norm = self._grad_norm()
        for flat in self._trainable:  # one still under way, of a unit not used since, would carry the old weights on
            self.weights.finish_update(flat)
        if accept is not None and not accept(norm):
            self._offloader.forget(lr, self.updates + 1)
            self._forget_gradients()
            return norm
        scale = None if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        self.updates += 1
        self._offloader.update(scale, lr, self.updates)
        self.optimizer.update(lr, scale, self.updates)
        for flat in self._resident:
            flat.publish()
            self.weights.start_refresh(flat)
        self._forget_gradients()
        self._share_buffers()
        return norm

    def _forget_gradients(self) -> None:
        for flat in self._trainable:
            flat.grad = None
            flat.received = [False] * len(flat.received)

    def _agree_on_received(self) -> None:
        """A parameter is updated everywhere if any rank has a gradient for it."""
        if self.mesh.world == 1:
            return
        flags = torch.tensor([got for flat in self._trainable for got in flat.received], dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        received = iter(flags.tolist())
        for flat in self._trainable:
            flat.received = [bool(next(received)) for _ in flat.received]

    def _grad_norm(self) -> Tensor:
        """2-norm of the mean gradient over all parameters, 0-dim fp32, after the final reduction."""
        total = torch.stack([_squares(flat) for flat in self._trainable]).sum()
        levels = self.mesh.num_levels
        if group := self.mesh.group(levels - self.placement.optim, levels):
            dist.all_reduce(total, group=group)
        return total.sqrt().float()

    def _share_buffers(self) -> None:
        if self.mesh.world > 1:
            for buffer in self._buffers.values():
                dist.broadcast(buffer, src=0)

    # ------------------------------------------------------------------------------------------------ state

    def pieces(self) -> Iterator[Piece]:
        """A piece of state that is away from the device is good until the next is asked for."""
        for flat, start, state in chain(self._resident_states(), self._offloader.walk(write=False)):
            for kind, tensor in state.items():
                yield from flat.pieces(kind, tensor, start)
        for flat in self._trainable:
            yield from flat.residual_pieces()
        for unit in self._all:
            if unit.frozen:
                yield from unit.frozen.pieces(MASTER, unit.frozen.shard, unit.frozen.start)
        if self.mesh.rank == 0:
            yield from self._buffer_pieces()

    def _buffer_pieces(self) -> Iterator[Piece]:
        for name, buffer in self._buffers.items():
            if stop := buffer.numel():
                yield Piece(
                    name=name, kind=BUFFER, start=0, stop=stop, shape=tuple(buffer.shape), tensor=buffer.view(-1)
                )

    def movable(self) -> Movable:
        return self._offloader.movable()

    def load(self, fill: Fill, *, moments: bool) -> None:
        def wanted(flat: TrainableFlat, start: int, state: dict[str, Tensor]) -> Iterator[Piece]:
            for kind, tensor in state.items():
                if kind == MASTER or moments:
                    yield from flat.named(kind, tensor, start)

        for flat in self._trainable:
            self.weights.finish_update(flat)
        frozen = [unit.frozen for unit in self._all if unit.frozen]
        fill(
            chain(
                *(wanted(*state) for state in self._resident_states()),
                *(flat.named(MASTER, flat.shard, flat.start) for flat in frozen),
                self._buffer_pieces() if moments else (),
            )
        )
        for away in self._offloader.walk(write=True):
            fill(wanted(*away))  # it is written back when the next is asked for
        for flat in self._trainable:
            if moments:
                flat.load_residuals(fill)
            flat.loaded()
            self.weights.start_refresh(flat)
        self._share_buffers()

    def _resident_states(self) -> Iterator[tuple[TrainableFlat, int, dict[str, Tensor]]]:
        """Flat, first element in the flat buffer, and from there tensors by kind of state: all that is on
        the device."""
        for flat in self._resident:
            yield flat, flat.optim_start, {MASTER: flat.master, **flat.moments}

    def close(self) -> None:
        """Let go of memory, drives and threads; the model is of no use afterwards."""
        for hook in self._hooks:  # a parameter's hook that leads back to it is a cycle that the collector cannot see
            hook.remove()
        self._hooks.clear()
        for unit in self._all:  # and so is a collective that never ends, with what autograd was at when it began
            for flat in unit.flats:
                flat.gathering = flat.refreshing = None
        self.activations.close()
        self._offloader.close()

    def state_bytes(self) -> dict[str, int]:
        """On the device, and ``host`` and ``nvme`` where anything is there."""
        flats, trainable = [flat for unit in self._all for flat in unit.flats if not flat.streamed], self._resident
        separate = [flat for flat in trainable if flat.master is not flat.owned]
        pools = self.weights, self._staging, self._reductions.scratch
        return {
            "parameters": sum(flat.shard.nbytes for flat in flats),
            "master": sum(flat.master.nbytes for flat in separate),
            "optimizer": sum(moment.nbytes for flat in trainable for moment in flat.moments.values()),
            "residuals": sum(residual.nbytes for flat in self._trainable for residual in flat.residuals.values()),
            "buffers": sum(pool.size_bytes for pool in pools),
            **self._offloader.bytes(),
        }

    def passing_bytes(self) -> dict[str, int]:
        made = [p.grad for unit in self._all for flat in unit.trainable for p in flat.parameters]
        held = [*made, *(flat.grad for flat in self._trainable)]
        return {
            "gradients": sum(grad.nbytes for grad in held if grad is not None) + self._offloader.leaving_bytes,
            "swapped activations": self.activations.device_bytes(),
        }

    def written_bytes_per_s(self) -> float:
        return self._offloader.written_bytes_per_s() + self.activations.pools.written_bytes_per_s()

    # ------------------------------------------------------------------------------------------------ units

    def _watch(self, unit: Unit, position: int) -> None:
        """Register the hooks that gather, release and reduce a unit; `position` is -1 for the root."""
        if unit.sharded or unit.waits:
            hook = unit.module.register_forward_pre_hook(lambda *_: self._before_forward(unit, position))
            self._hooks.append(hook)
        if unit.sharded:
            hook = unit.module.register_forward_hook(lambda *args: self._after_forward(unit, position, args[-1]))
            self._hooks.append(hook)
        for flat in unit.trainable:
            for parameter in flat.parameters:
                hook = parameter.register_post_accumulate_grad_hook(lambda _: self._after_gradient(unit))
                self._hooks.append(hook)

    def _before_forward(self, unit: Unit, position: int) -> None:
        self.weights.use(unit)
        for following in self.units[position + 1 : position + 1 + self._prefetch]:
            # an update under way would make the host wait, and ranks must gather in one order: not by how far it is
            if following.sharded and not any(flat.updating for flat in following.trainable):
                self.weights.start_gather(following)

    def _after_forward(self, unit: Unit, position: int, output: Any) -> None:
        if not torch.is_grad_enabled():
            self.weights.release(unit)
        elif unit is not self.root:
            if outputs := [tensor for tensor in _tensors(output) if tensor.requires_grad]:
                begins = self._begins_backward
                register_multi_grad_hook(outputs, lambda _: begins(position), mode="any")
            if position < len(self.units) - 1:
                self.weights.release(unit)

    def _before_backward(self, position: int) -> None:
        unit = self.units[position]
        for following in self.units[position + 1 :]:  # those that wait for a gradient which never comes, or for none
            self.weights.release(following)
        if unit.packed:
            self.weights.use(unit)
        for preceding in reversed(self.units[max(0, position - self._prefetch) : position]):
            if preceding.packed:
                self.weights.start_gather(preceding)

    def _after_gradient(self, unit: Unit) -> None:
        unit.num_pending -= 1
        if unit.num_pending:
            return
        if unit is not self.root:
            self.weights.release(unit)
        while self._unreduced and self._unreduced[0].num_pending == 0:
            self._reduce(self._unreduced.pop(0))

    def _reduce(self, unit: Unit) -> None:
        """Move a unit's gradients on, as far as this micro-batch asks."""
        first, last, scratch = self._first, self._last, self._reductions.scratch
        for flat in unit.trainable:
            if flat.scatters:
                whole = self._staging.take(flat.layout.size, flat.reduce_dtype, ring=2)
                flat.collect(whole, add=False)
                steps = flat.reduce_inner(whole, scratch, first=first, last=last)
                chain = self._reductions.launch(self._depart(flat, steps) if last else steps)
                self._staging.give(whole, chain)
            else:
                flat.accumulate(first=first, last=last)
                if last and not flat.alone:
                    self._reductions.launch(self._depart(flat, flat.reduce_outer(scratch)))
                elif last:
                    self._offloader.depart(flat)

    def _depart(self, flat: TrainableFlat, reduction: Steps) -> Steps:
        """A final reduction, after which the gradient leaves if its states are away."""
        yield from reduction
        self._offloader.depart(flat)


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard(
    model: nn.Module,
    mesh: Mesh,
    placement: Placement,
    *,
    units: Sequence[nn.Module],
    initial: Read,
    optimizer: OptimizerOptions,
    options: ParallelOptions,
    dtype: torch.dtype,
    device: torch.device,
    offload: OffloadOptions = KEEP,
    blocks: Sequence[nn.Module] = (),
    recompute: Sequence[nn.Module] = (),
    compile: Sequence[nn.Module] = (),
    most_tokens: int | None = None,
    say: Callable[[str], None] = log.info,
) -> ShardedModel:
    """Shard a model for training; collective over the mesh.

    model: its parameters may be on ``meta``: they get their memory here, each rank its own ranges, filled from
        ``initial(name, "master", start, stop)``. Calling it returns a 0-dim loss.
    units: disjoint submodules in the order they run, see `parallel.unit`.
    dtype: of compute, float32 or bfloat16; master weights and optimizer states are always float32.
    offload: what lives in host memory or on NVMe. Call `close` at the end to let go of it.
    blocks: whose activations are treated as ``offload.activations`` says, in the order they run.
    recompute, compile: modules whose forward is recomputed in the backward, or compiled by ``torch.compile``.
    most_tokens: of a micro-batch, where that is known: what activations are swapped to is made for it at once.
    say: gets what is chosen while training, in words.

    ValueError where a unit is not part of the model, or lies inside another, or for `offload` options that cannot be
    met; ArenaError and DriveError (OSErrors) where host memory or a drive is not to be had.
    """
    wrap_blocks(recompute=recompute, compile=compile)
    engine = ShardedModel(
        model, mesh, placement,
        units=units, optimizer=optimizer, options=options, dtype=dtype, device=device, offload=offload,
        blocks=blocks, recompute=recompute, most_tokens=most_tokens, say=say,
    )  # fmt: skip
    try:
        engine.load(filling(initial), moments=False)
    except BaseException:  # a peer has died, say: who survives builds the next engine in this process
        engine.close()
        raise
    return engine


def _squares(flat: TrainableFlat) -> Tensor:
    """The sum of squares of a final gradient, 0-dim float64."""
    if flat.holds_gradient:
        assert flat.squares is not None
        return flat.squares
    assert flat.grad is not None, "step() needs a forward_backward(last=True) before it"
    return optimizers.sum_of_squares(flat.grad)


def _least(num: int) -> int:
    """Over all ranks. Collective, on the hosts alone."""
    found = torch.tensor(num)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def _create_groups(mesh: Mesh, placement: Placement) -> None:
    """Create every process group that `placement` uses, in the same order on every rank."""
    levels = mesh.num_levels
    for level in range(levels):
        mesh.group(level, level + 1)
    for num in (placement.params, placement.grads, placement.optim):
        mesh.group(0, levels - num)
        mesh.group(levels - num, levels)
    mesh.group(levels - placement.optim, levels - placement.params)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
