"""The Triton kernels against the CPU's arithmetic, which equals the plain reference: bit by bit."""

import sys
from pathlib import Path

import pytest
import torch

from parallel.quantize import Format, dequantize, dequantize_sum, dequantize_sum_quantize, quantize

sys.path.insert(0, str(Path(__file__).parent))
from test_quantize import DTYPES, assert_same_bits, awkward, packed_for  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
FORMATS = [Format(bits, block) for bits in (8, 4) for block in (32, 128, 512, 4096)]


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_quantize_equals_the_cpu(fmt, dtype, feedback) -> None:
    for chunks, blocks in ((1, 1), (3, 5), (2, 1000), (8, 129)):
        numel = chunks * blocks * fmt.block
        values, expected = awkward(numel, dtype, blocks), packed_for(fmt, numel, chunks)
        lost = awkward(numel, torch.float32, blocks + 1) if feedback else None
        out, residual = expected.cuda(), None if lost is None else lost.cuda()
        quantize(values.cuda(), fmt, out, chunks=chunks, residual=residual)
        quantize(values, fmt, expected, chunks=chunks, residual=lost)
        assert_same_bits(out.cpu(), expected)
        if feedback:
            assert_same_bits(residual.cpu(), lost)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantize_equals_the_cpu(fmt, dtype) -> None:
    for chunks, blocks in ((1, 1), (3, 5), (2, 1000), (8, 129)):
        numel = chunks * blocks * fmt.block
        packed = packed_for(fmt, numel, chunks)
        quantize(awkward(numel, torch.float32, blocks), fmt, packed, chunks=chunks)
        expected, out = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype, device="cuda")
        dequantize(packed, fmt, expected, chunks=chunks)
        dequantize(packed.cuda(), fmt, out, chunks=chunks)
        assert_same_bits(out.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 9, 16, 33])
@pytest.mark.parametrize("fmt", FORMATS)
def test_dequantize_sum_equals_the_cpu(fmt, chunks, dtype) -> None:
    for blocks in (1, 131):
        numel = blocks * fmt.block
        packed = packed_for(fmt, chunks * numel, chunks)
        quantize(awkward(chunks * numel, torch.float32, blocks), fmt, packed, chunks=chunks)
        expected, out = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype, device="cuda")
        dequantize_sum(packed, fmt, expected, chunks=chunks)
        dequantize_sum(packed.cuda(), fmt, out, chunks=chunks)
        assert_same_bits(out.cpu(), expected)


def assert_fused_equals_the_cpu(fmt, out_fmt, feedback, chunks, out_chunks, blocks) -> None:
    numel = out_chunks * blocks * max(fmt.block, out_fmt.block)
    packed, expected = packed_for(fmt, chunks * numel, chunks), packed_for(out_fmt, numel, out_chunks)
    quantize(awkward(chunks * numel, torch.float32, blocks), fmt, packed, chunks=chunks)
    lost = awkward(numel, torch.float32, blocks + 1) if feedback else None
    out, residual = expected.cuda(), None if lost is None else lost.cuda()
    dequantize_sum_quantize(
        packed.cuda(), fmt, out, out_fmt, chunks=chunks, out_chunks=out_chunks, residual=residual
    )  # fmt: skip
    dequantize_sum_quantize(packed, fmt, expected, out_fmt, chunks=chunks, out_chunks=out_chunks, residual=lost)
    assert_same_bits(out.cpu(), expected)
    if feedback:
        assert_same_bits(residual.cpu(), lost)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("out_fmt", [Format(8, 256), Format(4, 256), Format(4, 64), Format(8, 4096)])
@pytest.mark.parametrize("fmt", [Format(8, 256), Format(4, 256), Format(4, 32), Format(8, 1024)])
def test_dequantize_sum_quantize_equals_the_cpu(fmt, out_fmt, feedback) -> None:
    for chunks, out_chunks, blocks in ((1, 1, 1), (2, 3, 7), (8, 4, 33), (9, 1, 5)):
        assert_fused_equals_the_cpu(fmt, out_fmt, feedback, chunks, out_chunks, blocks)


@pytest.mark.parametrize("block", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("bits", [8, 4])
def test_threads_with_several_pieces_of_a_block_equal_the_cpu(bits, block) -> None:
    for chunks, out_chunks, blocks in ((2, 3, 7), (3, 1, 130), (8, 2, 33)):
        assert_fused_equals_the_cpu(Format(bits, block), Format(4, block), False, chunks, out_chunks, blocks)


def test_more_elements_than_an_int32_counts() -> None:
    fmt, numel = Format(4, 256), (1 << 32) + (1 << 20)
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    values = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    values[-256:] = torch.arange(256, device="cuda") - 128
    packed, out = torch.empty(fmt.packed_bytes(numel), dtype=torch.uint8, device="cuda"), torch.empty_like(values)
    quantize(values, fmt, packed)
    dequantize(packed, fmt, out)
    end = values[-256:].cpu()
    expected, small = torch.empty(256, dtype=torch.bfloat16), packed_for(fmt, 256, 1)
    quantize(end, fmt, small)
    dequantize(small, fmt, expected)
    assert_same_bits(out[-256:].cpu(), expected)
    assert bool((out[:-256] == 1).all())


def test_a_slice_of_a_buffer_that_is_not_16_byte_aligned() -> None:
    fmt, numel = Format(8, 32), 32 * 9
    values = awkward(numel + 32, torch.float32, 5)[1 : 1 + numel]
    buffer = torch.zeros(fmt.packed_bytes(numel) + 16, dtype=torch.uint8)
    expected, out = buffer.clone(), buffer.cuda()
    quantize(values, fmt, expected[4:-12])
    on_gpu = torch.zeros(numel + 1, device="cuda")[1:].copy_(values)
    quantize(on_gpu, fmt, out[4:-12])
    assert_same_bits(out.cpu(), expected)
