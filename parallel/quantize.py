"""Symmetric block quantization of what crosses a link: ZeRO++ (arXiv 2306.10209, sections 3.1 and 3.3) for any size.

A packed chunk is its codes, then its fp32 scales, then zeros up to a multiple of 16 bytes: one message carries a chunk.
Eight bits: one int8 an element. Four bits: element i and element i + block/2 of a block share a byte, each as code + 8,
the former in the low nibble. All results are the same bits on CPU, on CUDA (`parallel.quantize_kernels`) and in the
tests' plain reference, by these rules:

- x = fp32(value), plus the residual in fp32 if there is one;
- scale = max |x| of the block * (1 / qmax), qmax 127 or 7, cut to 16 significant bits; a scale below 2^-100 becomes 0,
  so nothing here is ever subnormal: no result hangs on whether the processor flushes subnormals, and kernels may scale
  by powers of two;
- code * scale is exact, as a code has at most 7 bits more: what it is added to or subtracted from may take it in a
  fused operation or not;
- code = round half to even of x * (1 / scale), two IEEE operations; 0 where the scale is 0. No clamp: |code| <= qmax
  because the scale is short by at most 2^-15 of itself, its reciprocal and the product by 2^-24;
- dequantized = code * scale; residual = x - code * scale;
- sums are in fp32: of one chunk of eight bits after the other, of one group of `GROUP` chunks of four bits (or, the
  last, of fewer) after the other;
- the sum of a group is (sum of code * weight) * unit, for each block: unit is 2^-15 times the power of two at or below
  the largest of the group's scales, weight is scale / unit, rounded half to even. These are whole numbers of at most 22
  bits: nothing is rounded but scales, the largest not at all, as it has 16 bits, and the others by at most 2^-16 of it.
  A chunk so adds at most 1.1e-4 of the largest's step to the error, and one chunk's sum is what it dequantizes to;
- a block with an infinity or NaN gets the scale infinity and codes 0, which dequantize to NaN. Its residual becomes 0:
  a step that the finiteness check drops must not poison the steps after it.

Four bits have a sum of their own because a GPU otherwise waits for instructions: one multiplies two chunks' codes by
whole weights and adds both (`parallel.quantize_kernels`, [Note: four bits]). Eight bits would leave a weight 12, which
are too few, and their sums wait for memory.

x * (1 / scale) instead of x / scale: a division takes a GPU about ten instructions an element, which this would then
wait for instead of memory; what differs is which way a tie within 2^-22 is rounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 19
"""Elements that the CPU takes through all operations at a time: 7 MB of temporaries, which stay in a last-level cache.
Smaller pieces spend more on starting operations than a nearer cache saves."""
SMALLEST_SCALE = 2.0**-100
_BELOW_SMALLEST = SMALLEST_SCALE * (1 - 2.0**-24)
"""The next smaller fp32."""
_SCALE_MASK = -0x100
"""Of the bits of an fp32 as int32: 16 significant ones."""
GROUP = 8
"""Chunks of four bits that are summed in whole numbers, which kernels read as floats and so are to stay below 2^22."""
_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Format:
    """Codes of `bits` bits; `block` elements share one fp32 scale."""

    bits: int
    """8 or 4"""
    block: int
    """a power of two from 32 to 4096"""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"quantization has {self.bits} bits; allowed are 4 and 8")
        if not 32 <= self.block <= 4096 or self.block & (self.block - 1):
            raise ValueError(f"quantization has blocks of {self.block}; allowed are powers of two from 32 to 4096")

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << self.bits - 1) - 1

    def packed_bytes(self, numel: int) -> int:
        """Size of a chunk of `numel` elements, a multiple of 16 bytes. ValueError unless `numel` is whole blocks."""
        if numel % self.block or numel < 0:
            raise ValueError(f"{numel} elements are not a whole number of blocks of {self.block}")
        return numel * self.bits // 8 + (numel // self.block + 3) // 4 * 16

    def numel(self, packed_bytes: int) -> int:
        """The elements of a chunk of that size. ValueError where `packed_bytes` returns it for no number."""
        block_bytes = self.block * self.bits // 8
        fours, rest = divmod(packed_bytes, 4 * block_bytes + 16)  # four blocks have 16 bytes of scales
        more, odd = divmod(rest - 16, block_bytes) if rest else (0, 0)
        if packed_bytes < 0 or more < 0 or odd:
            raise ValueError(f"{packed_bytes} bytes are not a chunk of whole blocks of {self}")
        return (4 * fours + more) * self.block


def quantize(values: Tensor, fmt: Format, out: Tensor, *, chunks: int = 1, residual: Tensor | None = None) -> None:
    """Pack each of `chunks` equal parts of `values` on its own.

    values: (n) fp32 or bf16; out: (chunks * fmt.packed_bytes(n / chunks)) uint8; residual: None, or (n) fp32, which is
    added to the values and becomes what quantizing lost of the sum (error feedback). ValueError for other arguments.
    """
    numel = _part(values.numel(), chunks, fmt.block)
    _check("values", values, values.numel(), _FLOATS, values)
    _check("out", out, chunks * fmt.packed_bytes(numel), (torch.uint8,), values)
    if residual is not None:
        _check("residual", residual, values.numel(), (torch.float32,), values)
    if not values.numel():
        return
    if values.is_cuda:
        from parallel import quantize_kernels as kernels

        kernels.quantize(values, fmt.bits, fmt.block, out, chunks, residual)
        return
    cpu, rows = _Cpu(), out.view(chunks, -1)
    for some, start, stop in _pieces(chunks, numel, fmt.block):
        place = slice(some.start * numel + start, (some.stop - 1) * numel + stop)
        lost = None if residual is None else residual[place]
        cpu.quantize(values[place], fmt, rows[some], start, numel, lost)


def dequantize(packed: Tensor, fmt: Format, out: Tensor, *, chunks: int = 1) -> None:
    """The values of `chunks` packed chunks, one after the other.

    packed: (chunks * fmt.packed_bytes(n / chunks)) uint8; out: (n) fp32 or bf16 (rounded half to even). ValueError for
    other arguments.
    """
    numel = _part(out.numel(), chunks, fmt.block)
    _check("out", out, out.numel(), _FLOATS, packed)
    _check("packed", packed, chunks * fmt.packed_bytes(numel), (torch.uint8,), packed)
    if not out.numel():
        return
    if packed.is_cuda:
        from parallel import quantize_kernels as kernels

        kernels.dequantize(packed, fmt.bits, fmt.block, out, chunks, add=False)
        return
    cpu, rows = _Cpu(), packed.view(chunks, -1)
    for some, start, stop in _pieces(chunks, numel, fmt.block):
        cpu.dequantize(rows[some], fmt, start, numel, out[some.start * numel + start : (some.stop - 1) * numel + stop])


def dequantize_sum(packed: Tensor, fmt: Format, out: Tensor, *, chunks: int) -> None:
    """The sum of `chunks` packed chunks of m elements each, in fp32 and in their order (see above).

    packed: (chunks * fmt.packed_bytes(m)) uint8; out: (m) fp32 or bf16 (rounded once, half to even). ValueError for
    other arguments.
    """
    _part(chunks, chunks, 1)
    numel = _part(out.numel(), 1, fmt.block)
    _check("out", out, numel, _FLOATS, packed)
    _check("packed", packed, chunks * fmt.packed_bytes(numel), (torch.uint8,), packed)
    if not numel:
        return
    if packed.is_cuda:
        from parallel import quantize_kernels as kernels

        kernels.dequantize(packed, fmt.bits, fmt.block, out, chunks, add=True)
        return
    cpu, rows = _Cpu(), packed.view(chunks, -1)
    for _, start, stop in _pieces(1, numel, fmt.block):
        cpu.dequantize_sum(rows, fmt, start, numel, out[start:stop])


def dequantize_sum_quantize(
    packed: Tensor,
    fmt: Format,
    out: Tensor,
    out_fmt: Format,
    *,
    chunks: int,
    out_chunks: int = 1,
    residual: Tensor | None = None,
) -> None:
    """`dequantize_sum`, then `quantize` into `out_chunks` chunks; the fp32 sum goes through no memory on CUDA.

    packed: (chunks * fmt.packed_bytes(m)) uint8; out: (out_chunks * out_fmt.packed_bytes(m / out_chunks)) uint8, from
    whose size m is known; residual: None or (m) fp32. m / out_chunks is whole blocks of either format. ValueError for
    other arguments.
    """
    _part(chunks, chunks, 1)
    numel = fmt.numel(packed.numel() // chunks)
    out_numel = _part(numel, out_chunks, max(fmt.block, out_fmt.block))
    _check("packed", packed, chunks * fmt.packed_bytes(numel), (torch.uint8,), packed)
    _check("out", out, out_chunks * out_fmt.packed_bytes(out_numel), (torch.uint8,), packed)
    if residual is not None:
        _check("residual", residual, numel, (torch.float32,), packed)
    if not numel:
        return
    if packed.is_cuda:
        from parallel import quantize_kernels as kernels

        kernels.dequantize_sum_quantize(
            packed, fmt.bits, fmt.block, out, out_fmt.bits, out_fmt.block, numel, chunks, out_chunks, residual
        )
        return
    cpu, rows, to = _Cpu(), packed.view(chunks, -1), out.view(out_chunks, -1)
    for some, start, stop in _pieces(out_chunks, out_numel, max(fmt.block, out_fmt.block)):
        place = slice(some.start * out_numel + start, (some.stop - 1) * out_numel + stop)
        total = cpu.temporary("total", place.stop - place.start)
        cpu.dequantize_sum(rows, fmt, place.start, numel, total)
        cpu.quantize(total, out_fmt, to[some], start, out_numel, None if residual is None else residual[place])


def _part(numel: int, chunks: int, block: int) -> int:
    """The elements of one of `chunks` equal parts, whole blocks."""
    if chunks < 1 or numel % chunks or numel // chunks % block:
        raise ValueError(f"{numel} elements do not make {chunks} equal chunks of whole blocks of {block}")
    return numel // chunks


def _check(name: str, tensor: Tensor, numel: int, dtypes: tuple[torch.dtype, ...], beside: Tensor) -> None:
    if tensor.dtype not in dtypes or tensor.shape != (numel,) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; "
            f"it has to be contiguous ({numel},) of {' or '.join(map(str, dtypes))}"
        )
    if tensor.device != beside.device or tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{name} is on {tensor.device}; it has to be on {beside.device}, and that a CPU or CUDA device"
        )
    if tensor.dtype == torch.uint8 and tensor.storage_offset() % 4:
        raise ValueError(
            f"{name} starts at byte {tensor.storage_offset()} of its storage; fp32 scales need multiples of 4"
        )


def _pieces(chunks: int, numel: int, block: int) -> Iterator[tuple[slice, int, int]]:
    """What the CPU takes at a time of `chunks` chunks of `numel` elements: some chunks, and of each from which element
    to which. Several whole chunks where they are small: operations on one take longer to start than to run."""
    size = max(PIECE, block)
    some = max(1, size // numel)
    for first in range(0, chunks, some):
        for start in range(0, numel, size):
            yield slice(first, min(first + some, chunks)), start, min(start + size, numel)


class _Cpu:
    """The operations on pieces of chunks, with their temporaries."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}

    def temporary(self, name: str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(numel): memory for this piece, which the pieces after it use again."""
        if name not in self._made or self._made[name].numel() < numel:
            self._made[name] = torch.empty(numel, dtype=dtype)
        return self._made[name][:numel]

    def quantize(
        self, values: Tensor, fmt: Format, packed: Tensor, start: int, numel: int, residual: Tensor | None
    ) -> None:
        """Pack `values` as the elements from `start` on of each of the chunks `packed` (k, bytes) of `numel`."""
        size = values.numel()
        codes, scales = _views(packed, fmt, start, start + size // packed.shape[0], numel)
        if start == 0 and numel // fmt.block % 4:
            packed[:, numel * fmt.bits // 8 + 4 * (numel // fmt.block) :].zero_()
        x, y = values, self.temporary("y", size)
        if values.dtype != torch.float32:
            x = self.temporary("x", size).copy_(values)
        if residual is not None:
            x = residual.add_(x)
        shape = *scales.shape, fmt.block
        rows, y_rows = x.view(shape), y.view(shape)

        torch.abs(x, out=y)
        torch.amax(y_rows, 2, out=scales)  # NaN if there is one
        scales.mul_(1 / fmt.qmax).view(torch.int32).bitwise_and_(_SCALE_MASK)
        torch.threshold_(scales, _BELOW_SMALLEST, 0.0).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        inverse = scales.reciprocal().nan_to_num_(posinf=0.0)
        torch.mul(rows, inverse.unsqueeze(2), out=y_rows).round_()
        bad = scales == torch.inf if scales.max().item() == torch.inf else None
        if bad is not None:
            y_rows.masked_fill_(bad.unsqueeze(2), 0.0)
        if fmt.bits == 8:
            codes.view(torch.int8).copy_(y_rows)
        else:
            half = fmt.block // 2
            # -119 to 119, a signed byte; adding 8 * 16 + 8 makes it the two biased nibbles
            pairs = self.temporary("pairs", size // 2).view(*scales.shape, half)
            torch.add(y_rows[..., :half], y_rows[..., half:], alpha=16, out=pairs)
            codes.view(torch.int8).copy_(pairs)
            codes.add_(136)
        if residual is not None:
            residual.sub_(y_rows.add_(0.0).mul_(scales.unsqueeze(2)).view(-1))  # no -0 from rounding
            if bad is not None:
                residual.view(shape).masked_fill_(bad.unsqueeze(2), 0.0)

    def dequantize_sum(self, packed: Tensor, fmt: Format, start: int, numel: int, out: Tensor) -> None:
        """`out` from the sum over the chunks `packed` (k, bytes) of `numel`, in their order, of their elements from
        `start` on."""
        total = out if out.dtype == torch.float32 else self.temporary("x", out.numel())
        if len(packed) == 1:
            self.dequantize(packed, fmt, start, numel, total)
        elif fmt.bits == 4:
            self._sum_groups(packed, fmt, start, numel, total)
        else:
            self._sum_in_order(packed, fmt, start, numel, total)
        if total is not out:
            out.copy_(total)

    def _sum_in_order(self, packed: Tensor, fmt: Format, start: int, numel: int, total: Tensor) -> None:
        size, some = total.numel(), max(1, PIECE // total.numel())
        before: tuple[Tensor, ...] = ()
        for parts in packed.split(some):
            if len(parts) == 1 and not before:
                self.dequantize(parts, fmt, start, numel, total)
            else:
                y = self.temporary("y", len(parts) * size).view(-1, size)
                self.dequantize(parts, fmt, start, numel, y.view(-1))
                first, *rest = before + y.unbind()
                for part in rest:
                    first = torch.add(first, part, out=total)
            before = (total,)

    def _sum_groups(self, packed: Tensor, fmt: Format, start: int, numel: int, total: Tensor) -> None:
        size, some = total.numel(), max(1, PIECE // total.numel())
        for i, group in enumerate(packed.split(GROUP)):
            codes, scales = _views(group, fmt, start, start + size, numel)
            unit = scales.amax(0).clamp_(min=SMALLEST_SCALE)
            unit.view(torch.int32).bitwise_and_(0x7F800000)
            unit.mul_(2.0**-15)
            weights = (scales / unit).round_().unsqueeze(2)  # an infinity makes them NaN
            rows = (self.temporary("group", size) if i else total).view(-1, fmt.block)
            rows.copy_(weights.sum(0).mul_(-8))  # codes are read as code + 8
            for parts, part_weights in zip(codes.split(some), weights.split(some), strict=True):
                y = self.temporary("y", len(parts) * size).view(len(parts), *rows.shape)
                self._nibbles(parts, y)
                for part, weight in zip(y, part_weights, strict=True):
                    rows.addcmul_(part, weight)
            rows.mul_(unit.unsqueeze(1))
            if i:
                total.add_(rows.view(-1))

    def dequantize(self, packed: Tensor, fmt: Format, start: int, numel: int, out: Tensor) -> None:
        """`out` from the elements from `start` on of each of the chunks `packed` (k, bytes) of `numel`."""
        values = out if out.dtype == torch.float32 else self.temporary("x", out.numel())
        codes, scales = _views(packed, fmt, start, start + out.numel() // packed.shape[0], numel)
        rows = values.view(*scales.shape, fmt.block)
        if fmt.bits == 8:
            rows.copy_(codes.view(torch.int8))
        else:
            self._nibbles(codes, rows)
            rows.sub_(8)
        rows.mul_(scales.unsqueeze(2))
        if values is not out:
            out.copy_(values)

    def _nibbles(self, codes: Tensor, rows: Tensor) -> None:
        """Codes (k, blocks, block / 2) of four bits, plus 8, as `rows` (k, blocks, block) fp32."""
        half, nibbles = rows.shape[2] // 2, self.temporary("nibbles", codes.numel(), torch.uint8).view(codes.shape)
        rows[..., :half].copy_(torch.bitwise_and(codes, 15, out=nibbles))
        rows[..., half:].copy_(torch.bitwise_right_shift(codes, 4, out=nibbles))


def _views(packed: Tensor, fmt: Format, start: int, stop: int, numel: int) -> tuple[Tensor, Tensor]:
    """Of chunks (k, bytes) of `numel`, their elements from `start` to `stop`: codes (k, blocks, bytes) uint8, scales
    (k, blocks) fp32."""
    codes_bytes = numel * fmt.bits // 8
    codes = packed[:, start * fmt.bits // 8 : stop * fmt.bits // 8]
    scales = packed[:, codes_bytes : codes_bytes + 4 * (numel // fmt.block)].view(torch.float32)
    shape = packed.shape[0], (stop - start) // fmt.block, fmt.block * fmt.bits // 8
    return codes.view(shape), scales[:, start // fmt.block : stop // fmt.block]
