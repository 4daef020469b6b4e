"""Block quantization on the CPU against a plain reference, which `test_quantize_gpu` uses too."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.quantize import Format, dequantize, dequantize_sum, dequantize_sum_quantize, quantize

F32 = np.float32
DTYPES = [torch.float32, torch.bfloat16]


def cut(scale):
    """To 16 significant bits."""
    return (scale.view(np.int32) & np.int32(-1 << 8)).view(F32)


def reference_quantize(values, fmt, chunks, residual=None):
    """One block at a time, one element at a time where it matters. Returns the bytes and the new residual."""
    x = values.float().numpy()
    if residual is not None:
        x = x + residual.numpy()
    qmax, packed, lost = F32(2 ** (fmt.bits - 1) - 1), b"", []
    for chunk in x.reshape(chunks, -1):
        codes, scales = b"", []
        for block in chunk.reshape(-1, fmt.block):
            if np.isfinite(block).all():
                scale = cut(np.abs(block).max() * (F32(1) / qmax))
                scale = scale if scale >= F32(2.0**-100) else F32(0)
            else:
                scale = F32(np.inf)
            whole = np.zeros(fmt.block, dtype=F32)
            if 0 < scale < np.inf:
                whole = np.round(block * (F32(1) / scale)) + F32(0)  # to even; a code is never -0
                assert np.abs(whole).max() <= qmax
            lost.append(np.zeros_like(block) if scale == np.inf else block - whole * scale)
            ints = [int(code) for code in whole]
            if fmt.bits == 8:
                codes += struct.pack(f"{fmt.block}b", *ints)
            else:
                half = fmt.block // 2
                codes += bytes((low + 8) | (high + 8) << 4 for low, high in zip(ints[:half], ints[half:], strict=True))
            scales.append(scale)
        chunk_bytes = codes + np.array(scales, dtype=F32).tobytes()
        packed += chunk_bytes + bytes(-len(chunk_bytes) % 16)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8), torch.from_numpy(np.concatenate(lost))


def reference_codes(chunk, fmt):
    """Of one packed chunk the codes (blocks, block) int64 and the scales (blocks) fp32."""
    raw, numel = bytes(chunk.tolist()), fmt.numel(chunk.numel())
    end, block_bytes, rows = numel * fmt.bits // 8, fmt.block * fmt.bits // 8, []
    for i in range(numel // fmt.block):
        block = raw[i * block_bytes : (i + 1) * block_bytes]
        if fmt.bits == 8:
            rows.append(struct.unpack(f"{fmt.block}b", block))
        else:
            rows.append([(byte & 15) - 8 for byte in block] + [(byte >> 4) - 8 for byte in block])
    return np.array(rows), np.frombuffer(raw[end : end + 4 * len(rows)], dtype=F32)


def reference_dequantize(packed, fmt, chunks):
    """(chunks, elements of one) fp32"""
    rows = []
    for chunk in packed.view(chunks, -1):
        codes, scales = reference_codes(chunk, fmt)
        with np.errstate(invalid="ignore"):
            rows.append((codes.astype(F32) * scales[:, None]).flatten())
    return torch.from_numpy(np.stack(rows))


def reference_group_sum(chunks, fmt):
    """Of up to eight packed chunks of four bits, block by block, in whole numbers."""
    unpacked = [reference_codes(chunk, fmt) for chunk in chunks]
    blocks = []
    for i in range(len(unpacked[0][1])):
        largest = max(float(scales[i]) for _, scales in unpacked)
        if math.isinf(largest):
            blocks.append(np.full(fmt.block, np.nan, dtype=F32))
            continue
        unit = 2.0 ** (math.frexp(max(largest, 2.0**-100))[1] - 16)
        whole = sum(codes[i] * round(float(scales[i]) / unit) for codes, scales in unpacked)
        assert np.abs(whole).max() < 1 << 22
        with np.errstate(over="ignore"):
            blocks.append((whole * unit).astype(F32))
    return torch.from_numpy(np.concatenate(blocks))


def reference_sum(packed, fmt, chunks):
    if fmt.bits == 8:
        total, *more = reference_dequantize(packed, fmt, chunks)
    else:
        total, *more = (reference_group_sum(group, fmt) for group in packed.view(chunks, -1).split(8))
    for values in more:
        total = total + values
    return total


def assert_same_bits(found, expected) -> None:
    """Equal bit by bit, but for which NaN a NaN is."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        integer = torch.int32 if found.dtype == torch.float32 else torch.int16
        found, expected = (tensor[~tensor.isnan()].view(integer) for tensor in (found, expected))
    assert torch.equal(found, expected)


def awkward(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values over the whole range of fp32: block by block another magnitude, outliers, zeros, inf, NaN, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.rand(numel // 32, generator=generator)
    exponent = torch.rand(numel // 32, generator=generator) * 76 - 38
    rows = torch.randn(numel // 32, 32, generator=generator) * 10.0 ** torch.where(pick < 0.5, 0, exponent)[:, None]
    rows[(0.5 < pick) & (pick < 0.6)] = 0
    where = torch.randint(32, (len(rows),), generator=generator)
    for low, value in ((0.6, 1e6), (0.70, 1e38), (0.8, torch.inf), (0.85, -torch.inf), (0.9, torch.nan), (0.95, 1e-44)):
        chosen = (low < pick) & (pick < low + 0.05)
        rows[chosen, where[chosen]] = value
    # whole multiples of a scale's half: ties
    ties = (0.45 < pick) & (pick < 0.5)
    rows[ties] = torch.randint(-14, 15, (int(ties.sum()), 32), generator=generator) / 2
    rows[ties, 0] = 7
    return rows.flatten().to(dtype)


def packed_for(fmt: Format, numel: int, chunks: int) -> torch.Tensor:
    return torch.full((chunks * fmt.packed_bytes(numel // chunks),), 0xAA, dtype=torch.uint8)


formats = st.builds(Format, bits=st.sampled_from([8, 4]), block=st.sampled_from([32, 64, 256, 4096]))
cases = given(
    fmt=formats, chunks=st.integers(1, 4), blocks=st.integers(1, 9), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30), feedback=st.booleans(),
)  # fmt: skip
few = settings(max_examples=60, deadline=None)


@few
@cases
def test_quantize_equals_the_reference(fmt, chunks, blocks, dtype, seed, feedback) -> None:
    numel = chunks * blocks * fmt.block
    values, out = awkward(numel, dtype, seed), packed_for(fmt, numel, chunks)
    residual = awkward(numel, torch.float32, seed + 1) if feedback else None
    with np.errstate(all="ignore"):
        expected, lost = reference_quantize(values, fmt, chunks, residual)
    before = values.clone()
    quantize(values, fmt, out, chunks=chunks, residual=residual)
    assert_same_bits(out, expected)
    assert_same_bits(values, before)
    if residual is not None:
        assert_same_bits(residual, lost)


@few
@cases
def test_dequantize_equals_the_reference(fmt, chunks, blocks, dtype, seed, feedback) -> None:
    numel = chunks * blocks * fmt.block
    packed, out = packed_for(fmt, numel, chunks), torch.empty(numel, dtype=dtype)
    quantize(awkward(numel, torch.float32, seed), fmt, packed, chunks=chunks)
    dequantize(packed, fmt, out, chunks=chunks)
    assert_same_bits(out, reference_dequantize(packed, fmt, chunks).flatten().to(dtype))


@few
@given(
    fmt=formats, chunks=st.integers(1, 20), blocks=st.integers(1, 5), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_dequantize_sum_equals_the_reference(fmt, chunks, blocks, dtype, seed) -> None:
    numel = blocks * fmt.block
    packed, out = packed_for(fmt, chunks * numel, chunks), torch.empty(numel, dtype=dtype)
    quantize(awkward(chunks * numel, torch.float32, seed), fmt, packed, chunks=chunks)
    dequantize_sum(packed, fmt, out, chunks=chunks)
    assert_same_bits(out, reference_sum(packed, fmt, chunks).to(dtype))


@few
@given(
    fmt=formats, out_fmt=formats, chunks=st.integers(1, 9), out_chunks=st.integers(1, 3), blocks=st.integers(1, 3),
    seed=st.integers(0, 1 << 30), feedback=st.booleans(),
)  # fmt: skip
def test_dequantize_sum_quantize_equals_the_two_steps(fmt, out_fmt, chunks, out_chunks, blocks, seed, feedback) -> None:
    numel = blocks * out_chunks * max(fmt.block, out_fmt.block)
    packed, out = packed_for(fmt, chunks * numel, chunks), packed_for(out_fmt, numel, out_chunks)
    quantize(awkward(chunks * numel, torch.float32, seed), fmt, packed, chunks=chunks)
    residual = awkward(numel, torch.float32, seed + 1) if feedback else None
    with np.errstate(all="ignore"):
        total = reference_sum(packed, fmt, chunks)
        expected, lost = reference_quantize(total, out_fmt, out_chunks, residual)
    dequantize_sum_quantize(
        packed, fmt, out, out_fmt, chunks=chunks, out_chunks=out_chunks, residual=residual
    )  # fmt: skip
    assert_same_bits(out, expected)
    if residual is not None:
        assert_same_bits(residual, lost)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("chunks", [3, 11])
@pytest.mark.parametrize("piece", [256, 8192])
def test_chunks_longer_than_a_piece_equal_the_reference(bits, chunks, piece, monkeypatch) -> None:
    """Or so short that some but not all of them make a piece."""
    monkeypatch.setattr("parallel.quantize.PIECE", piece)
    fmt, out_fmt, numel = Format(bits, 64), Format(8, 32), 5 * 256 + 64
    values, residual = awkward(chunks * numel, torch.bfloat16, 1), torch.zeros(chunks * numel)
    packed, out, total = packed_for(fmt, chunks * numel, chunks), torch.empty(chunks * numel), torch.empty(numel)
    expected, lost = reference_quantize(values, fmt, chunks, residual)
    quantize(values, fmt, packed, chunks=chunks, residual=residual)
    assert_same_bits(packed, expected)
    assert_same_bits(residual, lost)
    dequantize(packed, fmt, out, chunks=chunks)
    assert_same_bits(out, reference_dequantize(packed, fmt, chunks).flatten())
    dequantize_sum(packed, fmt, total, chunks=chunks)
    assert_same_bits(total, reference_sum(packed, fmt, chunks))
    again = packed_for(out_fmt, numel, 3)
    dequantize_sum_quantize(packed, fmt, again, out_fmt, chunks=chunks, out_chunks=3)
    assert_same_bits(again, reference_quantize(total, out_fmt, 3)[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("magnitude", [1e-28, 1e-3, 1.0, 1e30])
def test_error_is_at_most_half_a_step(bits, magnitude) -> None:
    fmt, numel = Format(bits, 128), 128 * 37
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)) * magnitude
    packed, out = packed_for(fmt, numel, 1), torch.empty(numel)
    quantize(values, fmt, packed)
    dequantize(packed, fmt, out)
    step = values.view(-1, 128).abs().amax(1, keepdim=True) / fmt.qmax
    assert ((out - values).view(-1, 128).abs() <= step * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-32])
def test_values_too_small_for_a_scale_become_zero_and_stay_in_the_residual(bits, magnitude) -> None:
    fmt = Format(bits, 32)
    values = torch.full((64,), magnitude)
    packed, out, residual = packed_for(fmt, 64, 1), torch.empty(64), torch.zeros(64)
    quantize(values, fmt, packed, residual=residual)
    dequantize(packed, fmt, out)
    assert_same_bits(out, torch.zeros(64))
    assert_same_bits(residual, values)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_that_is_not_finite_never_looks_plausible(bits, bad, dtype) -> None:
    fmt = Format(bits, 32)
    values = torch.ones(3 * 32)
    values[40] = bad
    packed, out, residual = packed_for(fmt, 96, 1), torch.empty(96, dtype=dtype), torch.full((96,), 0.25)
    quantize(values, fmt, packed, residual=residual)
    dequantize(packed, fmt, out)
    assert not out[32:64].isfinite().any()
    assert out[:32].isfinite().all() and out[64:].isfinite().all()
    assert not residual[32:64].any(), "the next step must not start from an infinity"
    total = torch.empty(48 * 2, dtype=dtype)
    dequantize_sum(torch.cat([packed, packed]), fmt, total, chunks=2)
    assert not total[32:64].isfinite().any()


@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 9, 64, 1024])
@pytest.mark.parametrize("spread", [0, 1, 8])
def test_a_sum_of_four_bits_is_off_by_little_of_the_largest_step(chunks, spread) -> None:
    """spread: chunks are of magnitudes up to 10^-spread apart."""
    fmt, numel = Format(4, 64), 64 * 9
    generator = torch.Generator().manual_seed(chunks)
    values = torch.randn(chunks, numel, generator=generator)
    values *= 10 ** (-spread * torch.rand(chunks, 1, generator=generator))
    packed, out = packed_for(fmt, chunks * numel, chunks), torch.empty(numel)
    quantize(values.flatten(), fmt, packed, chunks=chunks)
    dequantize_sum(packed, fmt, out, chunks=chunks)
    each = torch.empty(chunks * numel)
    dequantize(packed, fmt, each, chunks=chunks)
    terms = each.view(chunks, -1, 64).double()
    step = max(float(reference_codes(chunk, fmt)[1].max()) for chunk in packed.view(chunks, -1))
    rounded = 2.0**-24 * (chunks // 8) * float(terms.abs().sum(0).max())  # adding groups
    off = (out.view(-1, 64).double() - terms.sum(0)).abs().max()
    assert off <= 7 * 2.0**-16 * (chunks - 1) * step + rounded
    assert off < 0.005 * step * chunks**0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_the_sum_of_one_chunk_is_what_it_dequantizes_to(bits) -> None:
    fmt, numel = Format(bits, 32), 32 * 400
    packed, out, total = packed_for(fmt, numel, 1), torch.empty(numel), torch.empty(numel)
    quantize(awkward(numel, torch.float32, 4), fmt, packed)
    dequantize(packed, fmt, out)
    dequantize_sum(packed, fmt, total, chunks=1)
    assert_same_bits(total, out)


def test_the_order_of_eight_chunks_of_four_bits_does_not_matter() -> None:
    fmt, numel = Format(4, 32), 32 * 50
    packed, out, again = packed_for(fmt, 8 * numel, 8), torch.empty(numel), torch.empty(numel)
    quantize(awkward(8 * numel, torch.float32, 6), fmt, packed, chunks=8)
    dequantize_sum(packed, fmt, out, chunks=8)
    dequantize_sum(packed.view(8, -1)[[5, 2, 7, 0, 1, 6, 3, 4]].flatten(), fmt, again, chunks=8)
    assert_same_bits(again, out)


def test_values_whose_partial_sums_overflow_have_a_finite_sum_of_four_bits() -> None:
    fmt, out, packed = Format(4, 32), torch.empty(32), packed_for(Format(4, 32), 96, 3)
    quantize(torch.tensor([3e38, 3e38, -3e38]).repeat_interleave(32), fmt, packed, chunks=3)
    dequantize_sum(packed, fmt, out, chunks=3)
    torch.testing.assert_close(out, torch.full((32,), 3e38), rtol=1e-4, atol=0)


def test_error_feedback_loses_nothing_over_steps() -> None:
    fmt, numel, steps = Format(4, 64), 64 * 8, 50
    generator = torch.Generator().manual_seed(3)
    packed, out, residual = packed_for(fmt, numel, 1), torch.empty(numel), torch.zeros(numel)
    given_total, sent_total = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for _ in range(steps):
        values = torch.randn(numel, generator=generator)
        quantize(values, fmt, packed, residual=residual)
        dequantize(packed, fmt, out)
        given_total += values
        sent_total += out
    torch.testing.assert_close(sent_total + residual.double(), given_total, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fmt", [Format(8, 32), Format(4, 32), Format(4, 4096)])
def test_packed_bytes_are_aligned_and_tell_the_elements(fmt) -> None:
    for blocks in range(14):
        size = fmt.packed_bytes(blocks * fmt.block)
        assert size % 16 == 0 and fmt.numel(size) == blocks * fmt.block
        least = blocks * fmt.block * fmt.bits // 8 + 4 * blocks
        assert least <= size < least + 16
    assert Format(4, 256).packed_bytes(1024) == 512 + 16
    with pytest.raises(ValueError, match="not a chunk"):
        fmt.numel(fmt.packed_bytes(fmt.block) + 8)


def test_no_elements_are_no_bytes() -> None:
    none, out = torch.empty(0), torch.empty(0, dtype=torch.uint8)
    quantize(none, Format(8, 32), out, chunks=2)
    dequantize(out, Format(8, 32), none, chunks=2)
    dequantize_sum(out, Format(8, 32), none, chunks=2)


@pytest.mark.parametrize(("bits", "block"), [(2, 32), (8, 16), (8, 96), (4, 8192), (8, 0), (4, -64)])
def test_a_format_that_is_not_there_is_refused(bits, block) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        Format(bits, block)


def bytes_of(numel: int) -> torch.Tensor:
    return torch.zeros(numel, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("message", "values", "out", "options"),
    [
        ("whole blocks of 32", torch.ones(100), bytes_of(144), {}),
        ("3 equal chunks", torch.ones(128), bytes_of(144), {"chunks": 3}),
        ("0 equal chunks", torch.ones(128), bytes_of(144), {"chunks": 0}),
        ("values is torch.float64", torch.ones(128, dtype=torch.float64), bytes_of(144), {}),
        ("values is .*strides", torch.ones(256)[::2], bytes_of(144), {}),
        ("values is .*\\(2, 64\\)", torch.ones(2, 64), bytes_of(144), {}),
        ("out is .*\\(140,\\)", torch.ones(128), bytes_of(140), {}),
        ("out is torch.int8", torch.ones(128), bytes_of(144).view(torch.int8), {}),
        ("out starts at byte 1", torch.ones(128), bytes_of(145)[1:], {}),
        ("residual is torch.bfloat16", torch.ones(128), bytes_of(144), {"residual": torch.ones(128).bfloat16()}),
        ("residual is .*\\(64,\\)", torch.ones(128), bytes_of(144), {"residual": torch.ones(64)}),
        ("out is on meta", torch.ones(128), bytes_of(144).to("meta"), {}),
    ],
)
def test_quantize_refuses_what_it_cannot_do(message, values, out, options) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(values, Format(8, 32), out, **options)


def test_dequantize_refuses_what_it_cannot_do() -> None:
    fmt = Format(8, 32)
    with pytest.raises(ValueError, match="packed is .*\\(144,\\)"):
        dequantize(bytes_of(144), fmt, torch.empty(256))
    with pytest.raises(ValueError, match="packed is .*\\(144,\\)"):
        dequantize_sum(bytes_of(144), fmt, torch.empty(128), chunks=2)
    with pytest.raises(ValueError, match="out is torch.float16"):
        dequantize(bytes_of(144), fmt, torch.empty(128, dtype=torch.float16))
    with pytest.raises(ValueError, match="2 equal chunks of whole blocks of 128"):
        dequantize_sum_quantize(bytes_of(144), fmt, bytes_of(160), Format(8, 128), chunks=1, out_chunks=2)
    with pytest.raises(ValueError, match="not a chunk of whole blocks"):
        dequantize_sum_quantize(bytes_of(150), fmt, bytes_of(144), fmt, chunks=1)


def test_a_code_times_a_scale_needs_no_rounding() -> None:
    """For every mantissa of a scale; a power of two more changes nothing."""
    mantissas = np.arange(1 << 23, dtype=np.uint32) | F32(1).view(np.uint32)
    scales = np.unique(cut(mantissas.view(F32)))
    for code in range(1, 128):
        product = scales * F32(code)
        assert np.array_equal(product.astype(np.float64), scales.astype(np.float64) * code)
