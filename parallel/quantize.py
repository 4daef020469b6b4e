"""Symmetric block quantization of what crosses a link: ZeRO++ (arXiv 2306.10209, sections 3.1 and 3.3) for any size.

A packed chunk is its codes, then its fp32 scales, then zeros up to a multiple of 16 bytes: one message carries a chunk.
Eight bits: one int8 an element. Four bits: element i and element i + block/2 of a block share a byte, each as code + 8,
the former in the low nibble. All results are the same bits on CPU, on CUDA (`parallel.quantize_kernels`) and in the
tests' plain reference, by these rules:

- x = fp32(value), plus the residual in fp32 if there is one;
- scale = max |x| of the block / qmax, qmax 127 or 7; a scale below 2^-100 becomes 0, so nothing here is ever subnormal:
  no result hangs on whether the processor flushes subnormals, and kernels may scale by powers of two;
- code = round half to even of x * (1 / scale), two IEEE operations; 0 where the scale is 0. No clamp: |code| <= qmax
  because a normal scale, its reciprocal and the product are each off by at most 2^-24 of themselves;
- dequantized = code * scale; residual = x - code * scale; two IEEE operations, never a fused one;
- a block with an infinity or NaN gets the scale infinity and codes 0, which dequantize to NaN. Its residual becomes 0:
  a step that the finiteness check drops must not poison the steps after it.

x * (1 / scale) instead of x / scale: a division takes a GPU about ten instructions an element, which this would then
wait for instead of memory; what differs is which way a tie within 2^-22 is rounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 19
"""Elements that the CPU takes through all operations at a time: 7 MB of temporaries, which stay in a last-level cache.
Smaller pieces spend more on starting operations than a nearer cache saves."""
SMALLEST_SCALE = 2.0**-100
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
    cpu = _Cpu(numel, fmt.block)
    for chunk, packed in enumerate(out.view(chunks, -1)):
        for start, stop in cpu.pieces:
            place = slice(chunk * numel + start, chunk * numel + stop)
            lost = None if residual is None else residual[place]
            cpu.quantize(values[place], fmt, packed, start, numel, lost)


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
    cpu = _Cpu(numel, fmt.block)
    for chunk, part in enumerate(packed.view(chunks, -1)):
        for start, stop in cpu.pieces:
            cpu.dequantize_sum([part], fmt, start, numel, out[chunk * numel + start : chunk * numel + stop])


def dequantize_sum(packed: Tensor, fmt: Format, out: Tensor, *, chunks: int) -> None:
    """The sum of `chunks` packed chunks of m elements each, in fp32 and in the order of the chunks.

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
    cpu = _Cpu(numel, fmt.block)
    parts = list(packed.view(chunks, -1))
    for start, stop in cpu.pieces:
        cpu.dequantize_sum(parts, fmt, start, numel, out[start:stop])


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
    cpu = _Cpu(out_numel, max(fmt.block, out_fmt.block))
    parts = list(packed.view(chunks, -1))
    for chunk, to in enumerate(out.view(out_chunks, -1)):
        for start, stop in cpu.pieces:
            place = slice(chunk * out_numel + start, chunk * out_numel + stop)
            total = cpu.total[: stop - start]
            cpu.dequantize_sum(parts, fmt, place.start, numel, total)
            cpu.quantize(total, out_fmt, to, start, out_numel, None if residual is None else residual[place])


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


class _Cpu:
    """The operations on pieces of a chunk of `numel` elements, whole blocks of `block`, with their temporaries."""

    def __init__(self, numel: int, block: int) -> None:
        size = max(PIECE, block)
        self.pieces = [(start, min(start + size, numel)) for start in range(0, numel, size)]
        size = min(size, numel)
        self.x, self.y, self.total = torch.empty(3, size).unbind()
        self.pairs, self.pair_codes = torch.empty(size // 2), torch.empty(size // 2, dtype=torch.uint8)

    def quantize(
        self, values: Tensor, fmt: Format, packed: Tensor, start: int, numel: int, residual: Tensor | None
    ) -> None:
        """Pack `values` as the elements from `start` on of the chunk `packed` of `numel`."""
        codes, scales = _views(packed, fmt, start, start + len(values), numel)
        if start == 0:
            packed[numel * fmt.bits // 8 + 4 * (numel // fmt.block) :].zero_()
        x, y = values, self.y[: len(values)]
        if values.dtype != torch.float32:
            x = self.x[: len(values)].copy_(values)
        if residual is not None:
            x = residual.add_(x)
        rows, y_rows = x.view(-1, fmt.block), y.view(-1, fmt.block)

        torch.abs(x, out=y)
        torch.amax(y_rows, 1, out=scales)  # NaN if there is one
        scales.div_(fmt.qmax)
        scales.masked_fill_(scales < SMALLEST_SCALE, 0.0).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        inverse = scales.reciprocal().nan_to_num_(posinf=0.0)
        torch.mul(rows, inverse.unsqueeze(1), out=y_rows).round_()
        bad = scales == torch.inf
        any_bad = bool(bad.any())
        if any_bad:
            y_rows.masked_fill_(bad.unsqueeze(1), 0.0)
        if fmt.bits == 8:
            codes.view(torch.int8).copy_(y_rows)
        else:
            half = fmt.block // 2
            # -119 to 119, a signed byte; adding 8 * 16 + 8 makes it the two biased nibbles
            pairs = self.pairs[: len(y) // 2].view(-1, half)
            torch.add(y_rows[:, :half], y_rows[:, half:], alpha=16, out=pairs)
            codes.view(torch.int8).copy_(pairs)
            codes.add_(136)
        if residual is not None:
            residual.sub_(y_rows.add_(0.0).mul_(scales.unsqueeze(1)).view(-1))  # no -0 from rounding
            if any_bad:
                residual.view(-1, fmt.block).masked_fill_(bad.unsqueeze(1), 0.0)

    def dequantize_sum(self, parts: list[Tensor], fmt: Format, start: int, numel: int, out: Tensor) -> None:
        """`out` from the sum over `parts`, chunks of `numel`, of their elements from `start` on."""
        total = out if out.dtype == torch.float32 else self.x[: len(out)]
        for part, packed in enumerate(parts):
            y = total if part == 0 else self.y[: len(out)]
            codes, scales = _views(packed, fmt, start, start + len(out), numel)
            self._unpack(codes, scales, fmt, y.view(-1, fmt.block))
            if part:
                total.add_(y)
        if total is not out:
            out.copy_(total)

    def _unpack(self, codes: Tensor, scales: Tensor, fmt: Format, rows: Tensor) -> None:
        """rows: (blocks, fmt.block) fp32"""
        if fmt.bits == 8:
            rows.copy_(codes.view(torch.int8))
        else:
            half = fmt.block // 2
            pairs = self.pairs[: codes.numel()].view(-1, half)
            pair_codes = self.pair_codes[: codes.numel()].view(-1, half)
            pairs.copy_(torch.add(codes, 120, out=pair_codes).view(torch.int8))  # 16 * high + low
            low, high = rows[:, :half], rows[:, half:]
            torch.mul(pairs, 1 / 16, out=high).round_().add_(0.0)  # |low / 16| < 1/2; no -0
            torch.sub(pairs, high, alpha=16, out=low)
        rows.mul_(scales.unsqueeze(1))


def _views(packed: Tensor, fmt: Format, start: int, stop: int, numel: int) -> tuple[Tensor, Tensor]:
    """Of a chunk of `numel`, its elements from `start` to `stop`: codes (blocks, bytes) uint8, scales (blocks) fp32."""
    codes_bytes = numel * fmt.bits // 8
    codes = packed[start * fmt.bits // 8 : stop * fmt.bits // 8]
    scales = packed[codes_bytes : codes_bytes + 4 * (numel // fmt.block)].view(torch.float32)
    return codes.view(-1, fmt.block * fmt.bits // 8), scales[start // fmt.block : stop // fmt.block]
