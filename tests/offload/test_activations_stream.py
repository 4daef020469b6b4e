"""Blocks that run by tiles: the gradients of the whole, whatever the tiles, and memory that comes back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from offload.activations.attention_spread import Tiling
from offload.activations.blocks import Activations
from offload.activations.slots import Drives
from offload.options import ActivationOptions
from offload.plan import Recorder, load_bytes
from parallel.sequence import SequenceParallel
from tests.offload.leaving import assert_equal, give_up_in_each_block, gradients, llama_of, one_thread
from tests.offload.tier_conformance import PAGE
from trainer.models.llama import Block, Llama, rotary_tables
from trainer.options import LlamaOptions

__all__ = ["one_thread"]
CPU = torch.device("cpu")
SEQ, BATCH = 45, 2
OPTIONS = LlamaOptions(dim=32, ffn_dim=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
MODES = ["stream", "stream_input"]


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> Llama:
    """The same weights every time."""
    return llama_of(replace(OPTIONS, **changes), vocab_size=64, seq_len=2 * SEQ, dtype=dtype, device=CPU)


def batch(size: int = BATCH, length: int = SEQ) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(64, (size, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def streaming(model: Llama, tile_tokens: int, mode: str = "stream", **options: Any) -> Activations:
    """tile_tokens: of all sequences."""
    made = Activations(ActivationOptions(mode=mode, tile_tokens=tile_tokens), CPU, poison=True, **options)
    made.wrap(model.blocks())
    return made


def assert_near(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(("size", "tile"), [(1, 1), (1, 7), (1, 15), (1, 44), (1, 45), (1, 64), (2, 13), (2, 60)])
def test_gradients_are_those_of_the_whole(mode: str, heads: int, size: int, tile: int) -> None:
    expected, model = gradients(llama(num_kv_heads=heads), *batch(size)), llama(num_kv_heads=heads)
    stream = streaming(model, tile, mode)
    for _ in range(2):
        assert_near(gradients(model, *batch(size)), expected)
    assert len(expected) == 1 + len(list(model.parameters()))
    stream.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_gradients_in_fewer_bits(mode: str, dtype: torch.dtype, tolerance: float) -> None:
    """As near to those of fp64 as the untiled model's. The loss alone can be near by luck: held to a rounding."""
    exact, whole, model = gradients(llama(), *batch()), gradients(llama(dtype), *batch()), llama(dtype)
    stream = streaming(model, 26, mode)
    for found, plain, wanted in zip(gradients(model, *batch()), whole, exact, strict=True):
        error, allowed = (float((a.double() - wanted).norm() / wanted.norm()) for a in (found, plain))
        rounding = torch.finfo(dtype).eps / (BATCH * SEQ) ** 0.5 if wanted.dim() == 0 else 0.0  # a mean over the tokens
        assert error < max(1.5 * allowed, rounding) + 1e-7 and error < tolerance
    stream.close()


@pytest.mark.parametrize("mode", MODES)
def test_it_is_bitwise_the_same_each_time(mode: str) -> None:
    found = []
    for _ in range(2):
        model = llama(torch.float32)
        stream = streaming(model, 26, mode)
        found.append([tensor for _ in range(3) for tensor in gradients(model, *batch())])
        stream.close()
    assert_equal(*found)
    half = len(found[0]) // 3
    assert_equal(found[0][:half], found[0][-half:])


def test_both_modes_are_bitwise_alike() -> None:
    """Attention computed again is what was stored."""
    found = []
    for mode in MODES:
        model = llama(torch.float32)
        stream = streaming(model, 26, mode)
        found.append(gradients(model, *batch()))
        stream.close()
    assert_equal(*found)


def test_gradients_accumulate_over_micro_batches() -> None:
    plain, model = llama(), llama()
    stream = streaming(model, 20)
    for _ in range(3):
        for one in (plain, model):
            one(*batch()).backward()
    assert_near([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    stream.close()


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    """A frozen block is run by tiles as well; of another the last product alone is trained, or keys are not."""
    plain, model = llama(), llama()
    for one in (plain, model):
        one.embed.requires_grad_(False)
        one.layers[0].requires_grad_(False)
        one.layers[1].requires_grad_(False)
        one.layers[1].mlp.down.requires_grad_(True)
        one.layers[2].attention.qkv.requires_grad_(False)
    stream = streaming(model, 26)
    assert_near(gradients(model, *batch()), gradients(plain, *batch()))
    assert model.layers[1].mlp.gate_up.weight.grad is None and model.layers[2].attention.qkv.weight.grad is None
    assert stream.pools._slots.num_cut == 2, "the frozen block left nothing"
    stream.close()


def test_without_gradients_it_runs_by_tiles_and_stores_nothing() -> None:
    plain, model = llama(), llama()
    stream = streaming(model, 26)
    with torch.no_grad():
        assert_near([model(*batch())], [plain(*batch())])
    assert stream.pools.size_bytes() == {"buffers": 0, "host": 0, "nvme": 0}
    stream.close()
    assert "forward" not in model.blocks()[0].__dict__


@pytest.mark.parametrize("most_tokens", [None, 4 * SEQ])
def test_memory_does_not_grow(most_tokens: int | None) -> None:
    """Two buffers of a tile, and a slot for each block, whatever the lengths are once the longest was there."""
    plain, model = llama(), llama()
    stream = streaming(model, 26, most_tokens=most_tokens)
    sizes = []
    for length in (SEQ, 2 * SEQ, 7, SEQ, 2 * SEQ, 1):
        assert_near(gradients(model, *batch(length=length)), gradients(plain, *batch(length=length)))
        sizes.append(stream.pools.size_bytes())
        assert stream.pools.num_buffers == 2 and stream.device_bytes() == sizes[-1]["buffers"]
    assert sizes[1:] == [sizes[1]] * 5 and (most_tokens is None or sizes[0] == sizes[1])
    stream.close()


def test_a_graph_that_is_dropped_gives_its_memory_back() -> None:
    """Before its backward, and within it."""
    plain, model = llama(), llama()
    stream = streaming(model, 26)
    give_up_in_each_block(
        model,
        lambda: gradients(model, *batch()),
        lambda: model(*batch()),
        lambda: assert_near(gradients(model, *batch()), gradients(plain, *batch())),
    )
    assert stream.pools.num_buffers == 2
    stream.close()


def test_a_graph_is_gone_through_once() -> None:
    model = llama()
    stream = streaming(model, 26)
    x = torch.ones(1, SEQ, OPTIONS.dim, dtype=torch.float64, requires_grad=True)
    out = model.blocks()[0](x, model.cos[:SEQ], model.sin[:SEQ]).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone through once with offload.activations.mode=stream"):
        out.backward()
    stream.close()


@pytest.mark.parametrize("asked", [1, 2, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("lengths", [(1,), (9,), (1, 1), (2, 1), (3, 2), (4, 3, 3), (8, 7), (17, 16), (5, 5, 4, 4)])
def test_all_ranks_have_as_many_tiles(lengths: tuple[int, ...], asked: int) -> None:
    """Else one would wait for what another does not send. All tokens are there once, in tiles of the size asked for
    where that is possible."""
    each = [Tiling.of(lengths, rank, asked) for rank in range(len(lengths))]
    assert len({len(tiling.tiles) for tiling in each}) == 1 == len({tiling.tile_tokens for tiling in each})
    assert len(set(lengths)) > 1 or each[0].tile_tokens == min(asked, lengths[0])
    places = []
    for tiling, length in zip(each, lengths, strict=True):
        assert [token for tile in tiling.tiles for token in range(length)[tile]] == list(range(length))
        assert all(tile.stop - tile.start == tiling.tile_tokens for tile in tiling.tiles[:-1])
        for number, tile in enumerate(tiling.tiles):
            assert tiling.sizes(number)[tiling.rank] == tile.stop - tile.start > 0
            places.append(tiling.place(tiling.rank, number))
    assert places == list(range(len(places)))


def test_another_part_of_a_sequence_over_ranks_is_refused() -> None:
    """As attention does that is not by tiles: of other tokens it would be another model."""
    model = llama()
    stream = streaming(model, 26)
    sequence = SequenceParallel(None)
    sequence.size = 2
    with sequence.attention(3 * SEQ), pytest.raises(ValueError, match="rank 0 has 45 tokens of a sequence over ranks"):
        model(*batch())
    stream.close()


def slot_bytes(mode: str, tile: int, num_tokens: int = SEQ, size: int = BATCH, itemsize: int = 8) -> int:
    """Of one block, as it is rounded: tile after tile."""
    o, total = OPTIONS, 0
    for start in range(0, num_tokens, tile // size):
        tokens = size * min(tile // size, num_tokens - start)
        fields = [o.dim, *([o.num_heads * o.head_dim, o.num_heads] if mode == "stream" else [])]
        total += sum(-(-tokens * width * itemsize // 512) * 512 for width in fields)
    return -(-total // PAGE) * PAGE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("slots", "tile"), [(2, 26), (3, 26), (2, 200)])
def test_what_host_memory_does_not_hold_goes_on_to_a_drive(disk_folder: Path, mode: str, slots: int, tile: int) -> None:
    plain, model = llama(num_layers=6), llama(num_layers=6)
    each = slot_bytes(mode, tile)
    options = ActivationOptions(mode=mode, tile_tokens=tile, host_bytes=slots * each + 1)
    stream = Activations(options, CPU, drives=Drives(folders=[disk_folder]), poison=True)
    stream.wrap(model.blocks())
    for _ in range(3):
        assert_near(gradients(model, *batch()), gradients(plain, *batch()))
    assert stream.pools.size_bytes()["host"] == slots * each
    assert stream.pools.size_bytes()["nvme"] == (6 - slots) * each
    stream.close()
    assert stream.pools.written_bytes == 3 * (6 - slots) * each


def test_a_compiled_block_runs_by_tiles_too() -> None:
    plain, model = llama(torch.float32), llama(torch.float32)
    torch._dynamo.reset()
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend="aot_eager")
    stream = streaming(model, 26)
    for _ in range(2):
        assert_near(gradients(model, *batch()), gradients(plain, *batch()), rtol=1e-4, atol=1e-6)
    stream.close()
    assert_near(gradients(model, *batch()), gradients(plain, *batch()), rtol=1e-4, atol=1e-6)  # compiled, and whole


# ---------------------------------------------------------------------------------------------------- memory


WIDE = LlamaOptions(dim=64, ffn_dim=256, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=32)


def most_bytes(num_tokens: int, mode: str, tile: int = 64) -> int:
    """The most that a forward and backward of one block hold in fp32."""
    block = Block(WIDE, device=CPU, dtype=torch.float32)
    stream = Activations(ActivationOptions(mode=mode, tile_tokens=tile), CPU)
    stream.wrap([block])
    cos, sin = rotary_tables(num_tokens, WIDE.head_dim, 1e4, CPU)
    thin = torch.rand(1, num_tokens, 1, requires_grad=True)
    with Recorder() as recorder:
        (block(thin * torch.rand(WIDE.dim), cos, sin) * torch.rand(WIDE.dim)).sum().backward()
        return load_bytes(recorder.requests())


@pytest.mark.parametrize("mode", MODES)
def test_what_exists_for_all_tokens(mode: str) -> None:
    """Gradients of output and input, keys and values, and their gradients: by each token more no more than these."""
    o = WIDE
    expected = 4 * (2 * o.dim + 2 * 2 * o.num_kv_heads * o.head_dim)
    more = (most_bytes(2048, mode) - most_bytes(1024, mode)) / 1024
    assert expected <= more < 1.02 * expected
    assert expected < 0.1 * 4 * (6 * o.dim + 2 * o.num_heads * o.head_dim + 3 * o.ffn_dim) * 4, "of a whole block"


# ---------------------------------------------------------------------------------------------------- on a GPU


GPU = torch.device("cuda")
HEADS = [(8, 2, 64), (4, 4, 128)]


def gpu_block(dtype: torch.dtype, options: LlamaOptions) -> Block:
    """The same weights every time, in bf16 and then in `dtype`."""
    block, generator = Block(options, device=GPU, dtype=dtype), torch.Generator(GPU).manual_seed(0)
    for p in block.parameters():
        values = torch.randn(p.shape, generator=generator, device=GPU) * 0.05 + (1 if p.ndim == 1 else 0)
        p.data = values.bfloat16().to(dtype)
    return block


def block_gradients(block: Block, size: int, num_tokens: int) -> list[Tensor]:
    """Output, and gradients of input and weights."""
    dtype, generator = next(block.parameters()).dtype, torch.Generator(GPU).manual_seed(1)
    shape = size, num_tokens, block.mlp.down.out_features
    x, grad = (torch.randn(shape, generator=generator, device=GPU).bfloat16().to(dtype) for _ in range(2))
    tables = rotary_tables(num_tokens, block.attention.head_dim, 1e4, GPU)
    out = block(x.requires_grad_(), *tables)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], grad)]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kernel", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
def test_gradients_on_a_gpu(mode: str, heads: tuple[int, int, int], size: int, kernel: SDPBackend) -> None:
    """In bf16 no farther from fp32 than the untiled block is, by half."""
    if kernel == SDPBackend.CUDNN_ATTENTION and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("flash is taken before Hopper")
    num, num_kv, dim = heads
    options = LlamaOptions(dim=512, ffn_dim=1024, num_layers=1, num_heads=num, num_kv_heads=num_kv, head_dim=dim)
    exact = block_gradients(gpu_block(torch.float32, options), size, 1000)
    with sdpa_kernel(kernel):
        whole = block_gradients(gpu_block(torch.bfloat16, options), size, 1000)
        block = gpu_block(torch.bfloat16, options)
        stream = Activations(ActivationOptions(mode=mode, tile_tokens=size * 384), GPU, poison=True)
        stream.wrap([block])
        for _ in range(3):
            found = block_gradients(block, size, 1000)
            for one, plain, wanted in zip(found, whole, exact, strict=True):
                error, allowed = (float((a.float() - wanted).norm() / wanted.norm()) for a in (one, plain))
                assert error <= 1.5 * allowed, (error, allowed, tuple(wanted.shape))
    stream.close()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_what_exists_for_all_tokens_on_a_gpu(mode: str) -> None:
    """As on CPU, by the allocator: 14 KiB a token of a 1b block, and nothing grows."""
    options = LlamaOptions(dim=2048, ffn_dim=8192, num_layers=1, num_heads=32, num_kv_heads=8, head_dim=64)
    block = gpu_block(torch.bfloat16, options)
    stream = Activations(ActivationOptions(mode=mode, tile_tokens=1024), GPU, most_tokens=32768)
    stream.wrap([block])

    def most_bytes(num_tokens: int) -> int:
        tables = rotary_tables(num_tokens, options.head_dim, 1e4, GPU)
        thin = torch.rand(1, num_tokens, 1, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        wide = torch.rand(options.dim, device=GPU, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (block(thin * wide, *tables) * wide).sum().backward()
        block.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    most_bytes(4096)
    expected = 2 * 2 * options.dim + (2 + 4) * 2 * options.num_kv_heads * options.head_dim
    first, second = most_bytes(16384), most_bytes(32768)
    assert expected == 14 * 1024 and 0.98 * expected <= (second - first) / 16384 < 1.05 * expected
    assert most_bytes(32768) <= second
    stream.close()
