"""In which format weights and gradients cross each level of the mesh.

[Note: quantized weights]
Wherever weights are quantized on some level, *every* rank computes with the same dequantized values, the owner too, or
replicas would drift apart. The owner quantizes its fp32 master once an update; the bytes travel on as they are through
the innermost quantized level of their way (repacking would lose more), and exact, in the compute dtype, from there. If
that level is one of P's, the parameter shard itself is kept packed: what a gather sends is what the refresh brought.

[Note: quantized gradients]
A reduce-scatter over a level is an all-to-all of packed parts and a sum in fp32 (qgZ: ZeRO++, arXiv 2306.10209, section
3.3), level by level, the fastest first, so that the slow level carries the least. Between two quantized levels the sum
is quantized in the same pass. With error feedback a sender adds to each part what quantization took from it before
(Seide et al., Interspeech 2014).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest

import torch
from torch import Tensor

from parallel.collectives import BufferPool, Group, Step, all_gather, all_to_all, reduce_scatter
from parallel.mesh import Mesh
from parallel.options import ParallelOptions
from parallel.placement import Placement
from parallel.quantize import Format, dequantize, dequantize_sum, dequantize_sum_quantize, quantize

Values = Generator[Step, None, Tensor]


@dataclass(frozen=True)
class Transport:
    """Formats by level of the mesh, slowest first; None is exact."""

    weights: tuple[Format | None, ...]
    grads: tuple[Format | None, ...]
    error_feedback: bool = False
    exact: tuple[str, ...] = ()
    """Name patterns of parameters that are never quantized."""

    @classmethod
    def of(cls, options: ParallelOptions, mesh: Mesh, placement: Placement) -> "Transport":
        """What `options` say for `mesh`; nothing is quantized on a level of one member.

        ValueError for a level that the mesh has not, for a format of weights on a level that they never cross, and for
        error feedback where no gradient is quantized.
        """
        wide = [level for level in range(mesh.num_levels) if mesh.wide(level)]
        crossed = [level for level in wide if level >= mesh.num_levels - placement.optim]
        for key, named in (("weights_format", options.weights_format), ("grads_format", options.grads_format)):
            if unknown := set(named) - set(mesh.names):
                raise ValueError(
                    f"parallel.{key} names {', '.join(sorted(unknown))}; the levels are {', '.join(mesh.names)}"
                )
        for level in wide:
            if options.weights_format.get(mesh.names[level], "exact") != "exact" and level not in crossed:
                raise ValueError(
                    f"parallel.weights_format.{mesh.names[level]} is set, but no weights cross {mesh.names[level]}: "
                    f"the optimizer states are {placement.describe(mesh.names).partition('O ')[2]}; leave it out"
                )

        def formats(named: dict[str, str], default: str, block: int, among: list[int]) -> tuple[Format | None, ...]:
            quantized = {"none": [], "outer": wide[:1], "all": wide}[options.quantize]
            names = (named.get(name, default if i in quantized else "exact") for i, name in enumerate(mesh.names))
            return tuple(_format(name, block) if i in among else None for i, name in enumerate(names))

        weights = formats(options.weights_format, "int8", options.weights_block, crossed)
        grads = formats(options.grads_format, "int4", options.grads_block, wide)
        if options.error_feedback and any(weights) and not any(grads):
            raise ValueError(
                "parallel.error_feedback=true corrects quantized gradients, and these are exact on every level: set "
                "parallel.grads_format, or leave it out"
            )
        return cls(
            weights=weights,
            grads=grads,
            error_feedback=options.error_feedback,
            exact=tuple(options.exact),
        )

    @property
    def quantizes(self) -> bool:
        return any(self.weights) or any(self.grads)

    @property
    def block(self) -> int:
        """What a shard is a multiple of."""
        return max((format.block for format in (*self.weights, *self.grads) if format), default=1)

    def allows(self, name: str, num_dims: int) -> bool:
        """Whether a trained parameter shares a buffer with what is quantized: where anything is, it has two or more
        dimensions and matches no pattern of ``parallel.exact``."""
        return not self.quantizes or (num_dims >= 2 and not any(fnmatchcase(name, p) for p in self.exact))

    def check_blocks(self, numel: int, world: int) -> None:
        """ValueError where a block is larger than a rank's part of the largest buffer that is quantized, of `numel`
        elements: mostly padding would cross."""
        for key, formats in (("weights_block", self.weights), ("grads_block", self.grads)):
            for format in formats:
                if format and format.block > numel / world:
                    raise ValueError(
                        f"parallel.{key}={format.block} is larger than a shard: of the largest unit's {numel} elements "
                        f"each of {world} ranks has {numel / world:.0f}; lower it"
                    )

    def describe(self, names: Sequence[str]) -> str:
        """``weights int8/256 over node; gradients int4/128 over node; exact in any case: …``."""

        def over(formats: tuple[Format | None, ...]) -> str:
            shown = [f"int{f.bits}/{f.block} over {name}" for name, f in zip(names, formats, strict=True) if f]
            return ", ".join(shown) or "exact"

        if not self.quantizes:
            return "exact"
        feedback = ", with error feedback" if self.error_feedback and any(self.grads) else ""
        patterns = "".join(f", {pattern}" for pattern in self.exact)
        return (
            f"weights {over(self.weights)}; gradients {over(self.grads)}{feedback}; exact in any case: parameters of "
            f"fewer than two dimensions, frozen ones{patterns}"
        )


def _format(name: str, block: int) -> Format | None:
    return None if name == "exact" else Format(bits={"int8": 8, "int4": 4}[name], block=block)


@dataclass(frozen=True)
class Hop:
    """One level on the way of a sum."""

    group: Group
    format: Format | None
    residual: Tensor | None = None
    """fp32, of what is sent here: the error feedback."""


def scatter_sum(piece: Tensor, hops: Sequence[Hop], dtype: torch.dtype, scratch: BufferPool) -> Values:
    """Reduce-scatter ``piece`` (n) over one hop after the other, see [Note: quantized gradients].

    dtype: in which exact hops carry it and in which it is returned where any hop summed it.
    """
    packed, numel = None, piece.numel()
    for hop, following in zip_longest(hops, hops[1:]):
        count = hop.group.size()
        part = numel // count
        if hop.format is None:
            piece = yield from reduce_scatter(piece.to(dtype), hop.group)
            numel = part
            continue
        if packed is None:
            packed = scratch.take(count * hop.format.packed_bytes(part), torch.uint8)
            quantize(piece, hop.format, packed, chunks=count, residual=hop.residual)
        received = scratch.take(packed.numel(), torch.uint8, ring=2)
        yield from all_to_all(received, packed, hop.group)
        scratch.give(packed)
        packed = None
        if following and following.format:
            parts = following.group.size()
            packed = scratch.take(parts * following.format.packed_bytes(part // parts), torch.uint8, ring=2)
            dequantize_sum_quantize(
                received, hop.format, packed, following.format,
                chunks=count, out_chunks=parts, residual=following.residual,
            )  # fmt: skip
        else:
            piece = torch.empty(part, dtype=dtype, device=piece.device)
            dequantize_sum(received, hop.format, piece, chunks=count)
        scratch.give(received)
        numel = part
    return piece


def replicate_sum(piece: Tensor, hops: Sequence[Hop], scratch: BufferPool) -> Values:
    """All-reduce ``piece`` (n) over replicas on several levels, quantized on some: a reduce-scatter, then an all-gather
    back in the finest of their formats. The same bits on every replica."""
    total = piece.numel()
    piece = yield from scatter_sum(piece, hops, piece.dtype, scratch)
    finest = max((hop.format for hop in hops if hop.format), key=lambda format: format.bits)
    num_parts = total // piece.numel()
    packed = scratch.take(finest.packed_bytes(piece.numel()), torch.uint8, ring=2)
    quantize(piece, finest, packed)
    for hop in reversed(hops):
        gathered = scratch.take(packed.numel() * hop.group.size(), torch.uint8, ring=2)
        yield from all_gather(gathered, packed, hop.group)
        scratch.give(packed)
        packed = gathered
    out = torch.empty(total, dtype=piece.dtype, device=piece.device)
    dequantize(packed, finest, out, chunks=num_parts)
    scratch.give(packed)
    return out
