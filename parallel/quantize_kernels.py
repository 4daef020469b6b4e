"""Triton kernels of `parallel.quantize`. Imported only on CUDA.

[Note: pairs]
Four bits put element i and element i + block/2 of a block into one byte. So all kernels hold a tile as two halves `low`
and `high`, each (ROWS, block / 2) with one block a row: packing and unpacking then stay within a thread. Eight bits do
the same, so that there is one form. Only a fused kernel whose two formats differ in `block` moves data between threads.

[Note: eight bits]
Codes are read as 32-bit words. 2^23 + c is a float whose last bits are c, so a mask that keeps a code where it is in
its word and puts the exponent above it makes 2^23 + (code + bias) * 2^shift: one instruction, a conversion takes three.
A subtraction leaves code * 2^shift, which is multiplied by scale / 2^shift. That is exactly code * scale, because no
scale is small enough for scale / 2^8 to be subnormal, and a product needs no rounding: a sum may take it in a fused
operation.

[Note: four bits]
`dp2a` multiplies two 16-bit numbers by two bytes and adds both products to a 32-bit number: the weights of two chunks
by their codes of one element. `prmt` puts the bytes of their words beside each other; a mask keeps their low or, after
a shift, their high halves. So two chunks take 16 instructions for 8 elements, with arithmetic as of eight bits 48. A
sum starts from the bits of 1.5 * 2^23, less what the codes' bias adds: then its bits are those of 1.5 * 2^23 + sum, and
it takes no conversion. The power of two by which it is to be multiplied goes into a factor that there is anyway, if
there is one. An odd chunk is paired with itself, by the weight 0.

[Note: pieces]
Every thread with a part of a block does what is done once a block: its scale, the reciprocal, addresses. A thread's
accesses are of 16 bytes, so fewer threads share a block where each holds SPLIT pieces of its halves. A tile is then
(SPLIT * ROWS, block / 2 / SPLIT): the first pieces of all blocks, then the second. Threads go along a row and then down
the rows, so with no fewer rows than they reach, a thread holds what lies ROWS apart. In a third dimension it would be
the compiler's choice. 4 threads a block of 256 instead of 8 take an eighth of the instructions from the sum of two
four-bit chunks.

[Note: registers]
A quarter of a multiprocessor has 16384 registers, a warp 32 times a thread's, rounded up to a multiple of 8: with 88 or
96 there are 5 warps, with 80 there are 6, which a kernel needs that does little for each program: the limit costs the
sum of two chunks 16 bytes of a thread's stack, but kernels that are not split, or of eight chunks, ten times that. The
assembler moves loads behind other arithmetic, whatever their order here: wide loads are few and stay ahead.

Every other operation is one IEEE operation in fp32, and the kernels are compiled without fusing a product and a sum
into one by themselves (`enable_fp_fusion=False`): that is what makes them equal the CPU's arithmetic bit by bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment"

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """How a kernel is launched. `benchmarks/quantize.py --tune` finds these."""

    tile: int
    """Elements a program handles, at least a block."""
    warps: int
    vector: int
    """Neighbouring elements of a half that a thread holds: at most 16 bytes of each tensor in one access. Where a
    kernel's tensors differ in bytes an element, what keeps them in one layout: else data passes through shared
    memory."""
    split: int = 1
    """Of a fused kernel: pieces of a half that a thread holds. See [Note: pieces]."""
    registers: int | None = None
    """That a thread may have at most, where the kernel is split so. See [Note: registers]."""

    def options(self, tile: int) -> dict[str, int | None | bool]:
        """Of a launch. A block longer than the setting's tile gets more warps, not more elements a thread."""
        warps = self.warps * max(1, tile // self.tile)
        return {"num_warps": warps, "maxnreg": self.registers, "enable_fp_fusion": False}


SETTINGS = {
    "quantize fp32": Setting(4096, 4, 8),
    "quantize bf16": Setting(4096, 4, 16),
    "quantize feedback": Setting(4096, 4, 4),
    "dequantize fp32": Setting(4096, 4, 4),
    "dequantize bf16": Setting(4096, 4, 8),
    "sum fp32": Setting(4096, 4, 16),  # most of what it moves is packed, so the loads are to be wide, not the stores
    "sum bf16": Setting(2048, 2, 8),
    "fused two": Setting(2048, 1, 16, 2, 80),
    "fused few": Setting(1024, 1, 16),
    "fused many": Setting(1024, 1, 4),
    "fused feedback": Setting(4096, 4, 8),
}
FEW = {8: 4, 4: 8}
"""Of chunks of eight and of four bits, up to how many are few."""
EXPONENT = 0x4B000000
"""Of 2^23 as fp32. Given to kernels as an argument: the assembler makes two instructions of a mask and a constant."""


@triton.jit
def _spread(x, SPLIT: tl.constexpr):
    """From one of each block (ROWS) to one of each of its pieces (SPLIT * ROWS, 1). See [Note: pieces]."""
    if SPLIT > 1:
        x = tl.broadcast_to(x[None, :], SPLIT, x.shape[0]).reshape(SPLIT * x.shape[0])
    return x[:, None]


@triton.jit
def _pieces(ptr, row, STRIDE: tl.constexpr, LENGTH: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr):
    """(SPLIT * ROWS, LENGTH / SPLIT): to the first LENGTH elements of the rows `row` (ROWS, int64) of STRIDE."""
    piece: tl.constexpr = LENGTH // SPLIT
    column = tl.arange(0, SPLIT * row.shape[0])[:, None] // row.shape[0] * piece + tl.arange(0, piece)[None, :]
    return tl.max_contiguous(ptr + _spread(row, SPLIT) * STRIDE + column, [1, VECTOR])


@triton.jit
def _in_order(a, b, c, d):
    """Of each word's first to fourth byte (ROWS, n), all (ROWS, 4 n)."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], 4 * a.shape[1])


@triton.jit
def _scale(packed_ptr, scales_offset, row):
    """Of the blocks `row` (ROWS) of one packed chunk."""
    return tl.load((packed_ptr + scales_offset).to(tl.pointer_type(tl.float32)) + row)


@triton.jit
def _words(packed_ptr, row, BYTES: tl.constexpr, LENGTH: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr):
    """(SPLIT * ROWS, LENGTH / SPLIT): to the first LENGTH words of codes of the blocks `row`, of BYTES each."""
    return _pieces(packed_ptr.to(tl.pointer_type(tl.int32)), row, BYTES // 4, LENGTH, SPLIT, VECTOR // 4)


@triton.jit
def _eight_bits(words, exponent, SHIFT: tl.constexpr):
    """code * 2^SHIFT of the codes at bit SHIFT of `words`. See [Note: eight bits]."""
    field = (words & (0xFF << SHIFT)) ^ (exponent + (0x80 << SHIFT))
    return field.to(tl.float32, bitcast=True) - (8388608.0 + (0x80 << SHIFT))


@triton.jit
def _codes(words, exponent):
    """Of words (ROWS, n) the codes (ROWS, 4 n), every second times 256."""
    upper = words >> 16
    return _in_order(
        _eight_bits(words, exponent, 0), _eight_bits(words, exponent, 8),
        _eight_bits(upper, exponent, 0), _eight_bits(upper, exponent, 8),
    )  # fmt: skip


@triton.jit
def _add(
    low, high, packed_ptr, scales_offset, exponent, row,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add the blocks `row` (ROWS) of a packed chunk of eight bits. A fused operation does it: products are exact, so
    that it rounds once as the sum does."""
    words_ptr = _words(packed_ptr, row, BLOCK, BLOCK // 8, SPLIT, VECTOR)
    words, more_words = tl.load(words_ptr), tl.load(words_ptr + BLOCK // 8)
    scale = tl.broadcast_to(_spread(_scale(packed_ptr, scales_offset, row), SPLIT), words.shape)
    scale_8 = scale * 0.00390625
    scales = _in_order(scale, scale_8, scale, scale_8)
    return tl.fma(_codes(words, exponent), scales, low), tl.fma(_codes(more_words, exponent), scales, high)


@triton.jit
def _bytes_of(a, b, select):
    """The word of four of the bytes of `a` (0 to 3) and `b` (4 to 7): `select` has a digit for each, the last first."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, select], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _dot_first(total, weights, values):
    """total + the first unsigned 16 bits of `weights` * the first signed byte of `values` + the second * the second."""
    return tl.inline_asm_elementwise(
        "dp2a.lo.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weights, values, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _dot_last(total, weights, values):
    """As `_dot_first` with the third and fourth byte of `values`."""
    return tl.inline_asm_elementwise(
        "dp2a.hi.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weights, values, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _float(total):
    """The whole number of which `total` is the sum with the bits of 1.5 * 2^23."""
    return total.to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _group(
    packed_ptr, chunk_bytes, scales_offset, row,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """As `_sum`, of at most eight chunks of four bits. See [Note: four bits]."""
    scales = (_scale(packed_ptr, scales_offset, row),)
    for part in tl.static_range(1, PARTS):
        scales += (_scale(packed_ptr + part * chunk_bytes, scales_offset, row),)
    largest = tl.maximum(scales[0], 7.888609052210118e-31)  # the smallest scale
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, scales[part])
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000) - (15 << 23)
    inverse = ((254 << 23) - power).to(tl.float32, bitcast=True)
    unit = tl.where(largest < float("inf"), power.to(tl.float32, bitcast=True), float("nan"))

    start = tl.full(row.shape, 0x4B400000, tl.int32)
    pairs = ()
    for part in tl.static_range(0, PARTS, 2):
        weight = tl.fma(scales[part], inverse, 12582912.0).to(tl.int32, bitcast=True)
        if part + 1 < PARTS:
            next_weight = tl.fma(scales[part + 1], inverse, 12582912.0).to(tl.int32, bitcast=True)
            weights = _bytes_of(weight, next_weight, 0x5410)
        else:
            weights = weight & 0xFFFF
        start = _dot_first(start, weights, -0x07070708)  # -8 in each byte
        pairs += (_spread(weights, SPLIT),)

    total = tl.broadcast_to(_spread(start, SPLIT), SPLIT * row.shape[0], BLOCK // 8 // SPLIT)
    low_0, low_1, low_2, low_3 = total, total, total, total
    high_0, high_1, high_2, high_3 = total, total, total, total
    for part in tl.static_range(0, PARTS, 2):
        weights = pairs[part // 2]
        words = tl.load(_words(packed_ptr + part * chunk_bytes, row, BLOCK // 2, BLOCK // 8, SPLIT, VECTOR))
        if part + 1 < PARTS:
            next_ptr = packed_ptr + (part + 1) * chunk_bytes
            next_words = tl.load(_words(next_ptr, row, BLOCK // 2, BLOCK // 8, SPLIT, VECTOR))
        else:
            next_words = words  # their weight is 0
        first, last = _bytes_of(words, next_words, 0x5140), _bytes_of(words, next_words, 0x7362)
        low_first, low_last = first & 0x0F0F0F0F, last & 0x0F0F0F0F
        high_first, high_last = (first >> 4) & 0x0F0F0F0F, (last >> 4) & 0x0F0F0F0F
        low_0, low_1 = _dot_first(low_0, weights, low_first), _dot_last(low_1, weights, low_first)
        low_2, low_3 = _dot_first(low_2, weights, low_last), _dot_last(low_3, weights, low_last)
        high_0, high_1 = _dot_first(high_0, weights, high_first), _dot_last(high_1, weights, high_first)
        high_2, high_3 = _dot_first(high_2, weights, high_last), _dot_last(high_3, weights, high_last)
    low, high = _in_order(low_0, low_1, low_2, low_3), _in_order(high_0, high_1, high_2, high_3)
    return _float(low), _float(high), unit


@triton.jit
def _add_group(
    low, high, packed_ptr, chunk_bytes, scales_offset, row,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add the blocks `row` (ROWS) of PARTS packed chunks of four bits."""
    more_low, more_high, unit = _group(packed_ptr, chunk_bytes, scales_offset, row, PARTS, BLOCK, SPLIT, VECTOR)
    unit = _spread(unit, SPLIT)
    return low + more_low * unit, high + more_high * unit


@triton.jit
def _sum(
    packed_ptr, chunk_bytes, scales_offset, exponent, row,
    PARTS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of the blocks `row` (ROWS, int64) of PARTS consecutive packed chunks: the sum as halves, and its unit (ROWS),
    1 or of some blocks another power of two or NaN, by which both are to be multiplied."""
    chunk_bytes = tl.cast(chunk_bytes, tl.int64)
    if BITS == 4 and PARTS <= 8:
        low, high, unit = _group(packed_ptr, chunk_bytes, scales_offset, row, PARTS, BLOCK, SPLIT, VECTOR)
    else:
        unit = tl.full(row.shape, 1.0, tl.float32)
        low = tl.zeros((SPLIT * row.shape[0], BLOCK // 2 // SPLIT), tl.float32)
        high = low
        if BITS == 4:
            for part in range(0, PARTS // 8 * 8, 8):
                part_ptr = packed_ptr + part * chunk_bytes
                low, high = _add_group(low, high, part_ptr, chunk_bytes, scales_offset, row, 8, BLOCK, SPLIT, VECTOR)
            if PARTS % 8:
                part_ptr = packed_ptr + PARTS // 8 * 8 * chunk_bytes
                low, high = _add_group(
                    low, high, part_ptr, chunk_bytes, scales_offset, row, PARTS % 8, BLOCK, SPLIT, VECTOR
                )  # fmt: skip
        elif PARTS <= 8:  # unrolled, the loads of all parts are under way together
            for part in tl.static_range(PARTS):
                part_ptr = packed_ptr + part * chunk_bytes
                low, high = _add(low, high, part_ptr, scales_offset, exponent, row, BLOCK, SPLIT, VECTOR)
        else:
            for part in range(PARTS):
                part_ptr = packed_ptr + part * chunk_bytes
                low, high = _add(low, high, part_ptr, scales_offset, exponent, row, BLOCK, SPLIT, VECTOR)
    return low, high, unit


@triton.jit
def _code(x, inverse, BIAS: tl.constexpr):
    """The code plus BIAS (even) in the last bits of an int32, and the code as fp32; anything where x is not finite.

    Next to 1.5 * 2^23 floats are whole numbers: adding it rounds half to even, and the sum's last bits are the result.
    """
    shifted = x * inverse + (12582912.0 + BIAS)
    return shifted.to(tl.int32, bitcast=True), shifted - (12582912.0 + BIAS)


@triton.jit
def _store(ptr, codes, zero, good, inside, VECTOR: tl.constexpr):
    """The last byte of each of `codes`, or `zero` in blocks that are not good.

    A second store that is mostly masked takes fewer instructions than a selection for each byte, if stores are wide.
    """
    if VECTOR >= 8:
        tl.store(ptr, codes.to(tl.uint8), inside & good)
        tl.store(ptr, zero, inside & (good == 0))
    else:
        tl.store(ptr, tl.where(good, codes, zero).to(tl.uint8), inside)


@triton.jit
def _pack(
    low, high, unit, out_ptr, scales_offset, residual_ptr, row, blocks,
    HAS_RESIDUAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Quantize halves into the blocks `row` (ROWS, int32) of one packed chunk of `blocks` blocks.

    low, high: fp32, to be multiplied by unit (ROWS), the residual not yet added; residual_ptr: the chunk's part of it.
    """
    half: tl.constexpr = BLOCK // 2
    inside = _spread(row < blocks, SPLIT)
    if HAS_RESIDUAL:
        last = tl.minimum(row, blocks - 1).to(tl.int64)
        residual_ptr = _pieces(residual_ptr, last, BLOCK, half, SPLIT, VECTOR)
        low = low * _spread(unit, SPLIT) + tl.load(residual_ptr)
        high = high * _spread(unit, SPLIT) + tl.load(residual_ptr + half)
        unit = tl.full(unit.shape, 1.0, tl.float32)

    # floats without a sign are in the order of their bits, NaN last; of whole numbers one instruction compares three
    largest = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL).to(tl.int32, bitcast=True)
    largest = tl.max(tl.max(largest.reshape(SPLIT, row.shape[0], half // SPLIT), 0), 1).to(tl.float32, bitcast=True)
    scale = largest * unit * (0.007874015718698502 if BITS == 8 else 0.1428571492433548)  # 1 / qmax
    scale = (scale.to(tl.int32, bitcast=True) & -0x100).to(tl.float32, bitcast=True)
    scale = tl.where(scale < 7.888609052210118e-31, 0.0, scale)
    good = scale < float("inf")  # false for NaN too
    scale = tl.where(good, scale, float("inf"))
    used = good & (scale > 0.0)
    inverse = tl.where(used, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(used, scale, 1.0)), 0.0)
    scales_ptr = (out_ptr + scales_offset).to(tl.pointer_type(tl.float32)) + row
    # the padding behind the scales is written too: equal values make equal bytes
    tl.store(scales_ptr, tl.where(row < blocks, scale, 0.0), row < (blocks + 3) // 4 * 4)

    # a power of two rounds nothing: multiplied into the inverse instead of into each value it gives the same
    good, scale, inverse = _spread(good, SPLIT), _spread(scale, SPLIT), _spread(inverse * unit, SPLIT)
    bias: tl.constexpr = 0 if BITS == 8 else 8
    low_bits, low_code = _code(low, inverse, bias)
    high_bits, high_code = _code(high, inverse, bias)
    if BITS == 8:
        out_ptr = _pieces(out_ptr, row.to(tl.int64), BLOCK, half, SPLIT, VECTOR)
        _store(out_ptr, low_bits, 0, good, inside, VECTOR)
        _store(out_ptr + half, high_bits, 0, good, inside, VECTOR)
    else:
        # low's last byte is 1..15 and needs no mask; 136 is a pair of codes 0
        out_ptr = _pieces(out_ptr, row.to(tl.int64), half, half, SPLIT, VECTOR)
        _store(out_ptr, low_bits + (high_bits << 4), 136, good, inside, VECTOR)
    if HAS_RESIDUAL:
        tl.store(residual_ptr, tl.where(good, tl.fma(-low_code, scale, low), 0.0), inside)
        tl.store(residual_ptr + half, tl.where(good, tl.fma(-high_code, scale, high), 0.0), inside)


@triton.jit
def _quantize(
    values_ptr, out_ptr, residual_ptr, blocks, chunk_bytes, scales_offset,
    HAS_RESIDUAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = chunk * blocks * BLOCK
    # rows past the end read the last block again instead of being masked: only stores need masks
    values_ptr += start + tl.minimum(row, blocks - 1).to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK // 2)[None, :]
    values_ptr = tl.max_contiguous(values_ptr, [1, VECTOR])
    low, high = tl.load(values_ptr).to(tl.float32), tl.load(values_ptr + BLOCK // 2).to(tl.float32)
    out_ptr += chunk * chunk_bytes
    unit = tl.full(row.shape, 1.0, tl.float32)
    _pack(
        low, high, unit, out_ptr, scales_offset, residual_ptr + start, row, blocks, HAS_RESIDUAL, BITS, BLOCK, 1, VECTOR
    )


@triton.jit
def _dequantize(
    packed_ptr, out_ptr, blocks, chunk_bytes, scales_offset, exponent,
    PARTS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Each chunk to its place (PARTS = 1), or the sum of PARTS chunks (one chunk of programs)."""
    chunk = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < blocks)[:, None]
    row = tl.minimum(row, blocks - 1).to(tl.int64)
    packed_ptr += chunk * chunk_bytes
    low, high, unit = _sum(packed_ptr, chunk_bytes, scales_offset, exponent, row, PARTS, BITS, BLOCK, 1, VECTOR)
    out_ptr += (chunk * blocks + row[:, None]) * BLOCK + tl.arange(0, BLOCK // 2)[None, :]
    unit = unit[:, None]
    tl.store(out_ptr, (low * unit).to(out_ptr.dtype.element_ty), inside)
    tl.store(out_ptr + BLOCK // 2, (high * unit).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _dequantize_sum_quantize(
    packed_ptr, out_ptr, residual_ptr, in_blocks, in_chunk_bytes, in_scales_offset,
    blocks, chunk_bytes, scales_offset, exponent,
    PARTS: tl.constexpr, IN_BITS: tl.constexpr, IN_BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """in_blocks: in all of one input chunk; blocks: of one output chunk, a whole number of input blocks; SPLIT: 1 if
    IN_BLOCK is not BLOCK."""
    in_rows: tl.constexpr = ROWS * BLOCK // IN_BLOCK
    tile, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = chunk * blocks * BLOCK
    chunk_in_blocks = blocks // (IN_BLOCK // BLOCK) if IN_BLOCK > BLOCK else blocks * (BLOCK // IN_BLOCK)
    in_row = tl.minimum(chunk * chunk_in_blocks + tile * in_rows + tl.arange(0, in_rows), in_blocks - 1)
    low, high, unit = _sum(
        packed_ptr, in_chunk_bytes, in_scales_offset, exponent, in_row, PARTS, IN_BITS, IN_BLOCK, SPLIT, VECTOR
    )  # fmt: skip
    if IN_BLOCK != BLOCK:
        unit = unit[:, None]
        tile_in_order = tl.join(low * unit, high * unit).permute(0, 2, 1).reshape(ROWS, 2, BLOCK // 2)
        low, high = tl.split(tile_in_order.permute(0, 2, 1))
        unit = tl.full((ROWS,), 1.0, tl.float32)
    row = tile * ROWS + tl.arange(0, ROWS)
    out_ptr += chunk * chunk_bytes
    residual_ptr += start
    _pack(low, high, unit, out_ptr, scales_offset, residual_ptr, row, blocks, HAS_RESIDUAL, BITS, BLOCK, SPLIT, VECTOR)


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _scales_offset(numel: int, bits: int) -> int:
    return numel * bits // 8


def quantize(values: Tensor, bits: int, block: int, out: Tensor, chunks: int, residual: Tensor | None) -> None:
    """As `parallel.quantize.quantize`, of arguments that it has checked."""
    numel = values.numel() // chunks
    setting = SETTINGS[f"quantize {'feedback' if residual is not None else _NAMES[values.dtype]}"]
    rows = max(1, setting.tile // block)
    tiles = triton.cdiv(triton.cdiv(numel // block, 4) * 4, rows)
    _quantize[tiles, chunks](
        values, out, values if residual is None else residual,
        numel // block, out.numel() // chunks, _scales_offset(numel, bits),
        HAS_RESIDUAL=residual is not None, BITS=bits, BLOCK=block, ROWS=rows, VECTOR=setting.vector,
        **setting.options(block),
    )  # fmt: skip


def dequantize(packed: Tensor, bits: int, block: int, out: Tensor, chunks: int, *, add: bool) -> None:
    """`out` from each chunk in its place, or with `add` from the sum of the chunks."""
    numel = out.numel() if add else out.numel() // chunks
    setting = SETTINGS[f"{'sum' if add else 'dequantize'} {_NAMES[out.dtype]}"]
    rows = max(1, setting.tile // block)
    tiles = triton.cdiv(numel // block, rows)
    _dequantize[tiles, 1 if add else chunks](
        packed, out, numel // block, packed.numel() // chunks, _scales_offset(numel, bits), EXPONENT,
        PARTS=chunks if add else 1, BITS=bits, BLOCK=block, ROWS=rows, VECTOR=setting.vector,
        **setting.options(block),
    )  # fmt: skip


def fused_kind(chunks: int, bits: int, feedback: bool) -> str:
    """Which of `SETTINGS` the fused kernel has for chunks of `bits`."""
    if feedback:
        return "fused feedback"
    return "fused two" if chunks <= 2 else "fused few" if chunks <= FEW[bits] else "fused many"


def dequantize_sum_quantize(
    packed: Tensor,
    in_bits: int,
    in_block: int,
    out: Tensor,
    bits: int,
    block: int,
    numel: int,
    chunks: int,
    out_chunks: int,
    residual: Tensor | None,
) -> None:
    """As `parallel.quantize.dequantize_sum_quantize`, of arguments that it has checked; numel: of one input chunk."""
    out_numel = numel // out_chunks
    setting = SETTINGS[fused_kind(chunks, in_bits, residual is not None)]
    if not in_block == block >= 2 * setting.split * setting.vector:
        setting = replace(setting, split=1, registers=None)
    tile = max(setting.tile, in_block, block)
    tiles = triton.cdiv(triton.cdiv(out_numel // block, 4) * 4, tile // block)
    _dequantize_sum_quantize[tiles, out_chunks](
        packed, out, packed if residual is None else residual,
        numel // in_block, packed.numel() // chunks, _scales_offset(numel, in_bits),
        out_numel // block, out.numel() // out_chunks, _scales_offset(out_numel, bits), EXPONENT,
        PARTS=chunks, IN_BITS=in_bits, IN_BLOCK=in_block,
        HAS_RESIDUAL=residual is not None, BITS=bits, BLOCK=block, ROWS=tile // block,
        SPLIT=setting.split, VECTOR=setting.vector, **setting.options(tile),
    )  # fmt: skip
