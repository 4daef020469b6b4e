"""What a step computes and holds, unit by unit, in plain numbers: 175 billion parameters cost nothing here.

`Workload.read` takes the numbers from a model on ``meta``.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol, cast

from torch import nn

from parallel.cut import cut_units
from parallel.layout import ALIGN
from parallel.unit import Named


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What a block sends where the ranks of a level share sequences (`parallel.sequence`): in a forward q, k and v to
    the ranks of their heads, and what attention makes of them back; in a backward the gradients of all four."""

    level: str
    ranks: int
    token_bytes: float
    """Of all four together, a token of this rank's; those that stay here are among them."""
    collectives: int
    """In a forward."""
    again: bool
    """Whether a backward does those of the forward first: it runs the block again."""

    @classmethod
    def of(
        cls, level: str, ranks: int, num_heads: tuple[int, int], head_bytes: int, *, num_tiles: int, again: bool
    ) -> "Exchange":
        """num_heads: of queries, and of keys and values. num_tiles: of a block that runs by tiles, else 0."""
        heads, kv_heads = num_heads
        token_bytes = head_bytes * (2 * heads + 2 * math.lcm(kv_heads, ranks))
        collectives = 3 * num_tiles or 2  # keys and values apart from queries, or together
        return cls(level=level, ranks=ranks, token_bytes=token_bytes, collectives=collectives, again=again)


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """One unit, or `count` equal ones in a row. Elements are counted as they lie in the flat buffer, see `aligned`."""

    name: str
    count: int = 1
    matrices: int = 0
    """Trained elements of two or more dimensions."""
    vectors: int = 0
    """Trained elements that cross exactly, whatever is quantized: of fewer dimensions, or named in parallel.exact."""
    frozen: int = 0
    forward_flops: float = 0.0
    """A token."""
    backward_flops: float = 0.0
    activation_bytes: float = 0.0
    """A token: what the backward keeps where the unit is not recomputed."""
    input_bytes: float = 0.0
    """A token: what it keeps where it is."""
    fixed_bytes: float = 0.0
    """Workspace while the unit runs, whatever the micro-batch."""
    gathers_backward: bool = True
    """Whether the backward asks for the weights; an embedding's does not."""
    recompute: float = 0.0
    """The share of the forward that the backward does again."""
    exchange: Exchange | None = None
    """Where ranks share sequences."""
    is_root: bool = False
    """Parameters outside all units or of several: gathered from the start of the forward to the end of the backward."""

    @property
    def trained(self) -> int:
        return self.matrices + self.vectors

    @property
    def passes_backward(self) -> int:
        """How often a backward sends what the forward does once: gradients, and what is made again."""
        return 0 if self.exchange is None else 1 + self.exchange.again


@dataclass(frozen=True, kw_only=True)
class Workload:
    units: tuple[UnitCost, ...]
    """In the order they run; the root, if any, first."""
    tokens: int
    """Of a micro-batch on one rank; of sequences that ranks share the longest part."""
    micro_batches: int = 1
    """A step on one rank."""
    compute_bytes: int = 2
    """Of an element of the compute dtype."""
    reduce_bytes: int = 4
    """Of an element in which gradients cross: ``parallel.reduce_dtype``."""
    moments: int = 2
    """fp32 optimizer states an element."""
    num_parameters: int = 0
    """Tensors that train: a flag of each crosses a step, 1 byte."""
    buffer_bytes: int = 0
    """Persistent buffers, broadcast once a step."""
    prefetch_units: int = 1
    activation_bytes: float | None = None
    """At the step's peak on the device, where that is known better than from the units."""
    overlap: bool = True
    """False: every collective is waited for where it starts."""

    @property
    def root(self) -> UnitCost | None:
        return self.units[0] if self.units and self.units[0].is_root else None

    @property
    def block(self) -> UnitCost:
        """What is computed in most."""
        return max(self.row, key=lambda unit: unit.forward_flops * unit.count)

    @property
    def shared(self) -> Exchange | None:
        """How ranks share sequences, if any do."""
        return next((unit.exchange for unit in self.units if unit.exchange), None)

    @property
    def row(self) -> list[UnitCost]:
        """The units that run, one by one, without the root."""
        return [unit for unit in self.units if not unit.is_root for _ in range(unit.count)]

    @property
    def all(self) -> list[UnitCost]:
        return ([self.root] if self.root else []) + self.row

    @property
    def numel(self) -> int:
        return sum((unit.trained + unit.frozen) * unit.count for unit in self.units)

    @classmethod
    def read(
        cls,
        model: nn.Module,
        *,
        seq_len: int,
        micro_batch_size: int,
        micro_batches: int,
        compute_bytes: int,
        reduce_bytes: int,
        moments: int = 2,
        prefetch_units: int = 1,
        recompute: float = 0.0,
        recompute_attention: bool = False,
        keep_last: int = 0,
        exchange: Exchange | None = None,
        loss_chunk_tokens: int = 2048,
        exact: Sequence[str] = (),
    ) -> "Workload":
        """The numbers of a language model (`Readable`) whose parameters are on ``meta``.

        FLOPs of a block are its share of `flops_per_token`, so experts that a token does not visit and attention count
        as they do there. recompute: the share of a block's products that its backward does again; its attention too
        where `recompute_attention` says so; the blocks of `keep_last` do nothing again. exchange: what a block sends
        where ranks share sequences.
        """
        readable = cast(Readable, model)
        modules, blocks = readable.units(), set(readable.blocks())
        kept = set(readable.blocks()[len(blocks) - keep_last :])
        named, root = cut_units(model, modules)
        outside = _numel(model) - sum(_numel(module) for _, module, _ in named if module in blocks)
        block_flops = (readable.flops_per_token(seq_len) - 6 * outside) / 3 / max(1, len(blocks))
        units = [replace(_count("root", root, exact), is_root=True)] if root else []
        for name, module, own in named:
            unit = _count(name, own, exact)
            if module in blocks:
                unit = _block(unit, module, block_flops, compute_bytes, recompute, recompute_attention)
                unit = replace(unit, exchange=exchange)
                unit = _kept(unit) if module in kept else unit
            elif module is modules[-1]:
                unit = _head(unit, module, compute_bytes, loss_chunk_tokens)
            elif any(isinstance(m, nn.Embedding) for m in module.modules()):
                unit = _embedding(unit, own, compute_bytes)
            else:
                unit = _other(unit, module, own, compute_bytes)
            units.append(unit)
        persistent = model.state_dict(keep_vars=True)
        return cls(
            units=tuple(_folded(units)), tokens=micro_batch_size * -(-seq_len // (exchange.ranks if exchange else 1)),
            micro_batches=micro_batches, compute_bytes=compute_bytes, reduce_bytes=reduce_bytes, moments=moments,
            num_parameters=sum(p.requires_grad for p in model.parameters()), prefetch_units=prefetch_units,
            buffer_bytes=sum(b.nbytes for name, b in model.named_buffers() if name in persistent),
        )  # fmt: skip


class Readable(Protocol):
    """What `Workload.read` asks of a model: an ``nn.Module`` with the methods of ``trainer.models.LanguageModel``."""

    def units(self) -> list[nn.Module]: ...
    def blocks(self) -> list[nn.Module]: ...
    def flops_per_token(self, seq_len: int) -> int: ...


def aligned(numel: int) -> int:
    """Elements that a parameter takes in its flat buffer."""
    return -(-numel // ALIGN) * ALIGN


def _count(name: str, named: Named, exact: Sequence[str]) -> UnitCost:
    sizes = Counter[str]()
    for full_name, p in named:
        packs = p.ndim >= 2 and not any(fnmatchcase(full_name, pattern) for pattern in exact)
        sizes["frozen" if not p.requires_grad else "matrices" if packs else "vectors"] += aligned(p.numel())
    return UnitCost(name=name, matrices=sizes["matrices"], vectors=sizes["vectors"], frozen=sizes["frozen"])


def _block(
    unit: UnitCost, module: nn.Module, flops: float, compute_bytes: int, recompute: float, recompute_attention: bool
) -> UnitCost:
    """Activations are the inputs and outputs of its linear layers: what a Llama whose other operations are fused keeps
    (arXiv 2407.12117, sec. 3); an eager model keeps more."""
    widths = _widths(module)
    products = min(1.0, 2.0 * _numel(module) / flops)  # their share of the FLOPs
    return replace(
        unit, forward_flops=flops, backward_flops=2 * flops, activation_bytes=compute_bytes * sum(map(sum, widths)),
        input_bytes=compute_bytes * (widths[0][0] if widths else 0),
        recompute=recompute * products + (1.0 - products) * recompute_attention,
    )  # fmt: skip


def _kept(block: UnitCost) -> UnitCost:
    """As it is where its backward does nothing again."""
    return replace(block, recompute=0.0, exchange=replace(block.exchange, again=False) if block.exchange else None)


def _head(unit: UnitCost, module: nn.Module, compute_bytes: int, loss_chunk_tokens: int) -> UnitCost:
    """Taken to make its gradients in the forward (`trainer.models.loss`), a chunk of logits at a time. Its products are
    of all its weights, the shared ones too."""
    products = sum(p.numel() for p in module.parameters() if p.ndim >= 2)
    width, words = max(_widths(module), key=math.prod, default=(0, 0))
    return replace(
        unit, forward_flops=6.0 * products, activation_bytes=3.0 * compute_bytes * width,
        fixed_bytes=loss_chunk_tokens * words * (compute_bytes + 4) + 4 * products,
    )  # fmt: skip


def _embedding(unit: UnitCost, own: Named, compute_bytes: int) -> UnitCost:
    """Looks rows up, so its backward asks for no weights."""
    width = max((p.shape[-1] for _, p in own if p.ndim), default=0)
    return replace(unit, activation_bytes=compute_bytes * width, gathers_backward=False)


def _other(unit: UnitCost, module: nn.Module, own: Named, compute_bytes: int) -> UnitCost:
    """Taken to be linear layers: products are of its own weights."""
    products = sum(p.numel() for _, p in own if p.ndim >= 2)
    return replace(
        unit, forward_flops=2.0 * products, backward_flops=4.0 * products,
        activation_bytes=compute_bytes * sum(map(sum, _widths(module))),
    )  # fmt: skip


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _widths(module: nn.Module) -> list[tuple[int, int]]:
    """Of the inputs and outputs of its linear layers."""
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def _folded(units: Sequence[UnitCost]) -> list[UnitCost]:
    """Equal neighbours as one entry with a count."""
    folded: list[UnitCost] = []
    for unit in units:
        if folded and replace(folded[-1], name="", count=1) == replace(unit, name=""):
            folded[-1] = replace(folded[-1], count=folded[-1].count + 1)
        else:
            folded.append(unit)
    return folded
